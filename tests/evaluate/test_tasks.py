"""`smedjan eval` on each kind of rows, alone and against another model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import smedjan
from smedjan.cli import app
from smedjan.errors import ConfigError, DataError
from smedjan.evaluate.run import evaluate
from smedjan.evaluate.tasks import Decoding
from smedjan.generate import Sampling
from tests.train.conftest import configure, pairs, tiny, write_rows  # noqa: F401  (fixtures)


@pytest.fixture
def choices(write_rows):  # noqa: F811
    """12 rows; choices of several lengths, so that the normalisations differ."""
    options = ["qz", "hello hello hello", "text is tiny", "é🙂"]
    return write_rows(
        [{"prompt": "hello " * (i % 3 + 1), "choices": options[: 2 + i % 3], "answer": i % 2} for i in range(12)],
        "choices.jsonl",
    )


def outcomes(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_choices_by_sum_bytes_and_tokens(tiny, choices, tmp_path):  # noqa: F811
    report = evaluate(tiny, choices, backend="torch_reference", predictions=tmp_path / "out.jsonl")
    model = smedjan.load(tiny, backend="torch_reference")
    rows, found = [json.loads(line) for line in choices.read_text().splitlines()], outcomes(tmp_path / "out.jsonl")
    hits = {"": 0, "_bytes": 0, "_tokens": 0}
    for line, (row, outcome) in enumerate(zip(rows, found, strict=True), start=1):
        given, sums, sizes = model.tokenizer.encode(row["prompt"]), [], {"": [], "_bytes": [], "_tokens": []}
        for text in row["choices"]:
            tokens = model.tokenizer.encode(text, add_special_tokens=False)
            logits = model.logits([[*given, *tokens]])[0, len(given) - 1 : -1].astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            sums.append(logprobs[range(len(tokens)), tokens].sum())
            for norm, size in (("", 1), ("_bytes", len(text.encode())), ("_tokens", len(tokens))):
                sizes[norm].append(size)
        assert outcome["logprobs"] == pytest.approx(sums, rel=1e-5)
        assert (outcome["line"], outcome["answer"]) == (line, row["answer"])
        for norm in hits:
            taken = int(np.argmax(np.array(sums) / sizes[norm]))
            assert outcome[f"chosen{norm}"] == taken
            hits[norm] += taken == row["answer"]
    assert [report.accuracy, report.accuracy_bytes, report.accuracy_tokens] == [hit / 12 for hit in hits.values()]
    assert any(outcome["chosen"] != outcome["chosen_bytes"] for outcome in found)
    assert report.task == "choice"
    assert report.nll is report.exact_match is None
    assert report.ci95 == report.intervals["accuracy"]
    assert report.baselines == {"chance": pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3), "commonest": 0.5}


def test_against_an_adapter_differences_are_paired(configure, pairs, tmp_path):  # noqa: F811
    """A short LoRA run: better on its own rows, and every row's difference is that of the two runs alone."""
    config = configure(method="lora", train__steps=25, optim__lr=2e-2, backend="cpu_native", train__batch_size=8)
    smedjan.finetune(config)
    settings = {"backend": "cpu_native", "task": "perplexity"}
    base = evaluate(config.model, pairs, **settings)
    tuned = evaluate(config.model, pairs, adapter=config.out, **settings)
    both = evaluate(config.out, pairs, against=config.model, **settings)
    assert (both.nll, both.intervals) == (tuned.nll, tuned.intervals)
    gap = both.against["nll"]
    assert gap.other == pytest.approx(base.nll, rel=1e-12)
    assert gap.difference == pytest.approx(tuned.nll - base.nll, abs=1e-9)
    assert gap.ci95[0] <= gap.difference <= gap.ci95[1] < 0
    # The rows' difficulty, which both share, is no part of the paired interval.
    assert gap.ci95[1] - gap.ci95[0] < sum(r.intervals["nll"][1] - r.intervals["nll"][0] for r in (base, tuned))
    assert both.intervals["perplexity"] == tuple(map(math.exp, both.intervals["nll"]))
    turned = evaluate(config.model, pairs, against=config.out, **settings)
    assert turned.against["nll"].difference == pytest.approx(-gap.difference)
    same = evaluate(config.model, pairs, against=config.model, backend="cpu_native")
    assert {name: gap.ci95 for name, gap in same.against.items()} == dict.fromkeys(same.against, (0.0, 0.0))


def test_sampled_answers_are_those_of_generate(tiny, write_rows, capsys, tmp_path):  # noqa: F811
    """Row i of a run with seed s is `generate --seed s+i`, stop strings and all; a row's neighbours do not matter."""
    prompts = ["hello world", "tiny", "this is a tiny text", "world"]
    rows = write_rows([{"prompt": prompt, "answers": ["x y", prompt]} for prompt in prompts])
    flags = ["--temperature", "0.9", "--top-k", "40", "--max-new-tokens", "9", "--stop", "e", "--stop", "zq"]
    common = ["--backend", "cpu_native", "--json"]
    made = tmp_path / "made.jsonl"
    run = ["eval", str(tiny), "--data", str(rows), "--seed", "7", "--predictions", str(made), *flags, *common]
    assert app.run([*run, "--batch-size", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    answers = []
    for row, prompt in enumerate(prompts):
        assert app.run(["generate", str(tiny), prompt, "--seed", str(7 + row), *flags, *common]) == 0
        answers.append(json.loads(capsys.readouterr().out)["text"])
    assert found["answers"] == answers == [row["answer"] for row in outcomes(made)]
    assert len(set(answers)) > 1
    assert not any("e" in answer for answer in answers)
    assert found["task"] == "generate"
    assert found["backend"] == "cpu_native"
    assert found["plan_hash"]


def test_conversations_are_answered_when_asked(tiny, write_rows):  # noqa: F811
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    rows = write_rows([{"messages": talk}, {"messages": [*talk, *talk]}])
    assert evaluate(tiny, rows, backend="cpu_native").exact_match is None
    report = evaluate(tiny, rows, backend="cpu_native", task="generate", decoding=Decoding(max_new_tokens=5))
    assert report.nll is None
    model = smedjan.load(tiny, backend="cpu_native")
    text, _ = model.tokenizer.apply_chat_template(talk + talk[:1], add_generation_prompt=True)
    ids = [token for token in model.generate(model.tokenizer.encode(text), max_new_tokens=5) if token != 0]
    assert report.answers[1] == model.tokenizer.decode(ids)


def test_a_task_that_rows_do_not_allow_is_an_error(tiny, choices, write_rows):  # noqa: F811
    with pytest.raises(ConfigError, match="generate needs other rows") as caught:
        evaluate(tiny, choices, task="generate")
    assert caught.value.field == "task"
    long = write_rows([{"prompt": "hello " * 70, "choices": ["a", "b"], "answer": 0}], "long.jsonl")
    with pytest.raises(DataError, match="for a context of 64"):
        evaluate(tiny, long, backend="torch_reference")
    with pytest.raises(ConfigError, match="its folder is missing"):
        evaluate(tiny, choices, predictions=choices.parent / "none" / "out.jsonl")


def test_a_penalty_or_a_length_is_not_told_by_one_pass():
    assert Decoding().told_by_one_pass
    for other in (
        Decoding(sampling=Sampling(repetition_penalty=1.1)),
        Decoding(sampling=Sampling(temperature=0.5)),
        Decoding(max_new_tokens=3),
        Decoding(stop=("x",)),
    ):
        assert not other.told_by_one_pass
