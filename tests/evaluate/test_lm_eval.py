"""SmedjanLM gives lm-evaluation-harness the numbers of its own model for transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smedjan.errors import ConfigError
from smedjan.evaluate.run import evaluate
from tests.tolerances import assert_near
from tests.train.conftest import tiny, write_rows  # noqa: F401  (fixtures)

pytest.importorskip("lm_eval")

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from smedjan.evaluate.lm_eval import SmedjanLM

PAIRS = [
    ("hello world ", " this is"),
    ("hello world ", " tiny"),
    ("", "hello world"),
    ("this is a tiny text. " * 3, "hello"),
    ("hello " * 80, "world hello"),  # longer than the context of 64: cut on the left
    *(("the text " * 10, choice) for choice in (" a", " is tiny", "é🙂")),
]
TEXTS = ["hello world", "this is a tiny text " * 30, "é"]
MOST = [{"until": ["ld6", "r"]}, {"until": [], "repetition_penalty": 1.6}, {"until": "d6", "do_sample": False}]


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=n) for n, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def readable(tiny, tmp_path_factory):  # noqa: F811
    """The tiny model without a token that is no ASCII text: its answers hold letters, and so stop strings."""
    directory = tmp_path_factory.mktemp("readable")
    model, tokenizer = (auto.from_pretrained(tiny) for auto in (AutoModelForCausalLM, AutoTokenizer))
    for token in range(1, len(tokenizer)):
        if not tokenizer.decode([token]).isascii():
            model.model.embed_tokens.weight.data[token] = 0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def peers(readable):
    """The harness's own in float32 and in float64."""
    plain, wide = (HFLM(pretrained=str(readable), device="cpu", dtype="float32", batch_size=3) for _ in range(2))
    wide.model.double()
    return plain, wide


@pytest.fixture(scope="module", params=["torch_reference", "cpu_native"])
def ours(request, readable):
    return SmedjanLM(str(readable), backend=request.param, batch_size=3)


def test_loglikelihood(ours, peers):
    requests = asked("loglikelihood", *PAIRS)
    found, plain, wide = (model.loglikelihood(requests) for model in (ours, *peers))
    each = [torch.tensor([logprob for logprob, _ in answers], dtype=torch.float64) for answers in (found, wide, plain)]
    assert_near("log-likelihoods", each[0].float(), each[1], each[2].float())
    assert [greedy for _, greedy in found] == [greedy for _, greedy in plain]


def test_loglikelihood_rolling(ours, peers):
    """The second text takes several windows, each of which fills the context."""
    requests = asked("loglikelihood_rolling", *((text,) for text in TEXTS))
    found, plain, wide = (model.loglikelihood_rolling(requests) for model in (ours, *peers))
    each = [torch.tensor(answers, dtype=torch.float64) for answers in (found, wide, plain)]
    assert_near("log-likelihoods", each[0].float(), each[1], each[2].float())


def test_generate_until(ours, peers):
    given = [
        (text, {**kwargs, "max_gen_toks": 12}) for text in [*TEXTS, "tiny", "text", "is this", "q"] for kwargs in MOST
    ]
    found, plain = (model.generate_until(asked("generate_until", *given)) for model in (ours, peers[0]))
    assert found == plain
    assert len(set(found)) > 4
    assert any(len(short) < len(free) for short, free in zip(found[::3], found[1::3], strict=True))


def test_what_it_cannot_do_is_an_error(ours):
    with pytest.raises(ConfigError, match="is no setting of generation here") as caught:
        ours.generate_until(asked("generate_until", ("hello", {"max_gen_toks": 2, "num_beams": 4})))
    assert caught.value.field == "num_beams"
    with pytest.raises(ConfigError, match="is 64, the context 64"):
        ours.generate_until(asked("generate_until", ("hello", {"max_gen_toks": 64})))


def task(rows):
    import datasets

    made = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
    config = {
        "task": "tiny",
        "custom_dataset": lambda **_: made,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    }
    return ConfigurableTask(config=config)


def test_a_task_of_the_harness_and_our_own_eval_agree(ours, peers, readable, write_rows):  # noqa: F811
    options = ["qz", "hello hello hello", "text is tiny", "é🙂"]
    rows = [
        {"prompt": "hello" + " world" * (i % 5), "choices": options[: 2 + i % 3], "answer": i % 3 % 2}
        for i in range(24)
    ]
    results = []
    for model in (ours, peers[0]):
        made = evaluator.evaluate(model, {"tiny": task(rows)}, bootstrap_iters=0, log_samples=False)
        results.append({name: made["results"]["tiny"][f"{name},none"] for name in ("acc", "acc_norm", "acc_bytes")})
    assert results[0] == results[1]
    report = evaluate(readable, write_rows(rows), backend=ours.session.backend.name)
    assert (report.accuracy, report.accuracy_bytes) == (results[0]["acc"], results[0]["acc_bytes"])
    assert len({json.dumps(value) for value in results[0].values()}) > 1
