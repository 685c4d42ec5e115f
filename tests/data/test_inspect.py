"""`data inspect` shows the tokens that a run would train on, counts as a run does, and refuses what trains badly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from smedjan.data.formats import Broken, Source, row_of
from smedjan.data.inspect import inspect_rows, pieces
from smedjan.data.mask import tokenize_row, tokenize_rows
from smedjan.errors import DataError

CHAT = [
    {"role": "user", "content": "what is two plus two"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "I am fine."},
]


def rows_of(*records: dict) -> list:
    return [row_of(record, Source(file=Path("rows.jsonl"), line=1 + index)) for index, record in enumerate(records)]


def trained_text(found) -> str:
    return "".join(piece.text for sample in found.samples for piece in sample.pieces if piece.trained)


@pytest.mark.parametrize(
    "text",
    [
        "the notice names the license",
        "naïve café — 日本語 🙂\u200d🙂 tabs\tand\n\n",
        "🙂" * 5,
        " leading",
        "\ufffd odd",
    ],
)
def test_pieces_are_the_row(plain, text):
    """Their texts together are the decoded row, their ids the row's, and no character is cut."""
    (row,) = rows_of({"text": text})
    example = tokenize_row(row, plain)
    made = list(pieces(example, plain.decode))
    assert [token for piece in made for token in piece.ids] == example.input_ids.tolist()
    assert "".join(piece.text for piece in made) == text + "<|im_end|>"
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece.text for piece in made)


@pytest.mark.parametrize("template", ["smollm2", "marked"])
def test_the_trained_tokens_of_a_conversation_are_its_answers(with_template, templates, template):
    found = inspect_rows(rows_of({"messages": CHAT}), with_template(templates[template]), max_length=512)
    assert trained_text(found) == "four<|im_end|>I am fine.<|im_end|>"
    last = inspect_rows(rows_of({"messages": CHAT}), with_template(templates[template]), max_length=512, loss_on="last")
    assert trained_text(last) == "I am fine.<|im_end|>"


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_counts_are_the_run_s(plain, too_long):
    """The very counts and tokens of `tokenize_rows`, and what is left of rows that are too long."""
    records = [{"prompt": "two plus two ", "completion": "four " * count} for count in (1, 2, 3, 30)]
    rows, limit = rows_of(*records), 24
    run = tokenize_rows(rows, plain, max_length=limit, too_long=too_long)
    found = inspect_rows(rows, plain, max_length=limit, too_long=too_long, samples=2)
    assert found.counts == run.counts
    assert found.tokens == sum(map(len, run.examples))
    assert found.trained_tokens == sum(example.trained_tokens for example in run.examples)
    sizes = sorted(map(len, run.examples))
    assert (found.lengths.min, found.lengths.max) == (sizes[0], sizes[-1])
    assert found.longest == len(tokenize_row(rows[-1], plain)) > limit
    assert len(found.samples) == 2
    assert found.counts.truncated + found.counts.dropped == 1


def test_broken_rows_are_counted_as_the_run_s(plain):
    only_asks = [{"role": "user", "content": "what is two plus two"}]
    rows = rows_of({"messages": CHAT[:2]}, {"messages": only_asks}, {"messages": CHAT[2:]})
    run = tokenize_rows(rows, plain, max_length=512, broken=Broken("drop"))
    found = inspect_rows(rows, plain, max_length=512, broken=Broken("drop"))
    assert found.counts == run.counts
    assert found.counts.rows == {"kept": 2, "truncated": 0, "dropped": 0, "broken": 1}
    with pytest.raises(DataError, match="no row is left, 1 are broken; line 1: has no token to train on"):
        inspect_rows(rows_of({"messages": only_asks}), plain, max_length=512, broken=Broken("drop"))


def refused(rows, tokenizer, **options) -> str:
    with pytest.raises(DataError) as caught:
        inspect_rows(rows, tokenizer, **{"max_length": 512} | options)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


def test_a_row_with_nothing_to_train_on(plain):
    only_asks = [{"role": "user", "content": "what is two plus two"}]
    assert "line 2: has no token to train on" in refused(rows_of({"messages": CHAT}, {"messages": only_asks}), plain)


def test_a_stop_token_that_nothing_trains(with_template):
    """The template closes a turn with a token at which generation does not stop."""
    tokenizer = with_template(
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert "no row trains a stop token" in refused(rows_of({"messages": CHAT}), tokenizer)
    stops_there = replace(tokenizer, eos_token="<|eot_id|>")
    assert inspect_rows(rows_of({"messages": CHAT}), stops_there, max_length=512).counts.unstopped == 0


@pytest.mark.parametrize("record", ["text", "messages"])
def test_bos_twice(with_bos, templates, record):
    """The tokenizer adds one to text, the template writes one before a conversation; the data holds another."""
    text = "<|begin_of_text|>the answer is four"
    if record == "text":
        assert "twice" in refused(rows_of({"text": text}), with_bos)
        return
    template = "{{ bos_token }}{% for message in messages %}{{ message.content + '<|im_end|>' }}{% endfor %}"
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "four"}]
    assert "twice" in refused(rows_of({"messages": chat}), replace(with_bos, chat_template=template))


def test_a_prompt_that_generation_renders_otherwise(with_template):
    """A marked template whose generation prompt is not how an answer begins in training."""
    tokenizer = with_template(
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
    )
    message = refused(rows_of({"messages": CHAT}), tokenizer)
    assert "generation would send ': '" in message
    assert "training shows" in message


def test_rows_that_are_all_too_long(plain):
    assert "no row is left" in refused(rows_of({"text": "the answer " * 40}), plain, max_length=8, too_long="drop")
