"""`eval`: its numbers against decoding token by token and against transformers' loss."""

from __future__ import annotations

import json

import smedjan
from smedjan.data.formats import read_rows
from smedjan.evaluate.run import evaluate, greedy_answers
from smedjan.evaluate.tasks import SPARE
from smedjan.generate import generate
from tests.train.conftest import configure, pairs, tiny, write_rows  # noqa: F401  (fixtures)


def alone(model, row) -> str:
    """The answer, decoded token by token with no other row beside it."""
    tokenizer = model.tokenizer
    room = len(tokenizer.encode(row.completion, add_special_tokens=False)) + SPARE
    stop = {*tokenizer.eos_token_ids, *model.session.config.eos_token_id}
    made = generate(model.session, tokenizer.encode(row.prompt), max_new_tokens=room, stop=stop)
    return tokenizer.decode([token for token in made if token not in stop])


def test_answers_told_in_one_pass_are_those_decoded(configure, pairs):  # noqa: F811
    """After a little training some rows are right and some wrong: both ways give every answer alike."""
    config = configure(method="full", train__steps=60, optim__lr=1e-2, backend="cpu_native")
    smedjan.finetune(config)
    rows = read_rows(pairs)
    for backend in ("cpu_native", "torch_reference"):
        model = smedjan.load(config.out, backend=backend)
        told = greedy_answers(model.session, model.tokenizer, rows)
        assert told == [alone(model, row) for row in rows]
        hits = [answer == row.completion for answer, row in zip(told, rows, strict=True)]
        assert any(hits)
    report = evaluate(config.out, pairs, backend="cpu_native")
    assert report.exact_match == sum(hits) / len(hits)
    assert report.n == len(rows)
    assert report.ci95 is not None
    assert report.ci95[0] <= report.exact_match <= report.ci95[1]


def test_limit_and_rows_without_a_completion(configure, write_rows):  # noqa: F811
    texts = write_rows([{"text": f"hello world {i}"} for i in range(4)], "texts.jsonl")
    report = evaluate(configure().model, texts, backend="torch_reference", limit=3)
    assert report.n == 3
    assert report.exact_match is None
    assert report.ci95 is None
    assert json.dumps(report.nll) != "NaN"
