"""What is trained, for every row type and `loss_on`, by the text of the trained tokens; boundaries, cuts, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from smedjan.data.files import Broken
from smedjan.data.formats import Row, Source, row_of
from smedjan.data.mask import Example, fit, stops, tokenize_row, tokenize_rows
from smedjan.errors import DataError, SmedjanError, TokenizerError

Make = Callable[[str | None], Any]


def row(line: int = 7, **record: Any) -> Row:
    return row_of(record, Source(file=Path("a.jsonl"), line=line))


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


def runs(tokenizer: Any, example: Example, trained: bool = True) -> list[str]:
    """The text of each run of trained (or untrained) tokens."""
    found: list[list[int]] = []
    before = not trained
    for token, mark in zip(example.input_ids.tolist(), example.labels_mask.tolist(), strict=True):
        if mark == trained:
            found = [*found[:-1], [*found[-1], token]] if before == trained else [*found, [token]]
        before = mark
    return [tokenizer.decode(ids) for ids in found]


def test_text_is_trained_whole_with_eos(plain: Any, with_bos: Any) -> None:
    example = tokenize_row(row(text="Hello, how are you?"), plain)
    assert example.input_ids.tolist() == [*plain.encode("Hello, how are you?", False), plain.eos_token_id]
    assert example.labels_mask.all()
    assert example.trained_tokens == len(example) - 1
    example = tokenize_row(row(text="Hello"), with_bos)
    assert example.input_ids.tolist() == [with_bos.bos_token_id, *plain.encode("Hello", False), plain.eos_token_id]


@pytest.mark.parametrize("loss_on", ["completion", "last", "all"])
def test_prompt_and_completion_meet_where_generation_begins(plain: Any, with_bos: Any, loss_on: Any) -> None:
    """The prompt's ids are those of the prompt alone, also where the text's own tokens would cross the boundary."""
    prompt, completion = "the notice names the lic", "ense"
    assert plain.encode(prompt + completion, False)[: len(plain.encode(prompt, False))] != plain.encode(prompt, False)
    for tokenizer in (plain, with_bos):
        before = tokenizer.encode(prompt, True)
        example = tokenize_row(row(prompt=prompt, completion=completion), tokenizer, loss_on=loss_on)
        answer = [*tokenizer.encode(completion, False), tokenizer.eos_token_id]
        assert example.input_ids.tolist() == before + answer
        assert example.labels_mask.tolist() == [loss_on == "all"] * len(before) + [True] * len(answer)


def test_a_tokenizer_that_adds_eos_ends_a_document_once(with_eos: Any) -> None:
    bos, eos = with_eos.bos_token_id, with_eos.eos_token_id
    for example in (
        tokenize_row(row(text="Hello"), with_eos),
        tokenize_row(row(prompt="Hello", completion=" you"), with_eos),
    ):
        ids = example.input_ids.tolist()
        assert (ids[0], ids[-1], ids.count(bos), ids.count(eos)) == (bos, eos, 1, 1)


def test_eos_that_the_text_holds_is_not_doubled(plain: Any) -> None:
    assert tokenize_row(row(text="Hello<|im_end|>"), plain).input_ids.tolist().count(plain.eos_token_id) == 1


def test_a_second_bos_is_refused(with_bos: Any) -> None:
    for record in ({"text": "<|begin_of_text|>Hello"}, {"prompt": "<|begin_of_text|>a", "completion": "b"}):
        with pytest.raises(DataError, match=r"a.jsonl: line 7: begins with <\|begin_of_text\|> twice"):
            tokenize_row(row(**record), with_bos)


TURNS = chat("Hello", "I am fine.", "and?", "the answer\n\nis four ", system="Be brief.")


@pytest.mark.parametrize("name", ["smollm2", "marked"])
def test_turns_are_trained_with_their_stop_token_and_nothing_else(
    with_template: Make, templates: dict[str, str], name: str
) -> None:
    tokenizer = with_template(templates[name])
    example = tokenize_row(row(messages=TURNS), tokenizer)
    assert runs(tokenizer, example) == ["I am fine.<|im_end|>", "the answer\n\nis four <|im_end|>"]
    untrained = runs(tokenizer, example, trained=False)
    assert untrained[1] == "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    assert untrained[2] == "\n"
    last = tokenize_row(row(messages=TURNS), tokenizer, loss_on="last")
    assert runs(tokenizer, last) == ["the answer\n\nis four <|im_end|>"]
    everything = tokenize_row(row(messages=TURNS), tokenizer, loss_on="all")
    assert everything.labels_mask.all()
    assert everything.input_ids.tolist() == example.input_ids.tolist() == last.input_ids.tolist()


@pytest.mark.parametrize("name", ["smollm2", "llama3", "marked"])
def test_a_conversation_is_tokenized_as_transformers_does(
    with_template: Make, templates: dict[str, str], name: str
) -> None:
    tokenizer = with_template(templates[name])
    peer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )
    mask = {"return_assistant_tokens_mask": True} if name == "marked" else {}
    out = peer.apply_chat_template(TURNS, chat_template=templates[name], **mask)
    example = tokenize_row(row(messages=TURNS), tokenizer)
    assert example.input_ids.tolist() == out["input_ids"]
    if mask:
        assert example.labels_mask.astype(int).tolist() == out["assistant_masks"]


def test_bos_of_a_template_is_the_only_one(with_bos: Any, templates: dict[str, str]) -> None:
    tokenizer = replace(with_bos, chat_template=templates["llama3"], eos_token="<|eot_id|>")
    example = tokenize_row(row(messages=TURNS, tools=[{"name": "f"}]), tokenizer, now=datetime(2024, 7, 26))
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert runs(tokenizer, example) == ["I am fine.<|eot_id|>", "the answer\n\nis four<|eot_id|>"]
    text = tokenizer.decode(example.input_ids.tolist())
    assert "Today Date: 26 Jul 2024" in text
    assert json.dumps({"name": "f"}, indent=4) in text


def test_a_mark_that_ends_before_the_stop_token(with_template: Make) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    tokenizer = with_template(source)
    example = tokenize_row(row(messages=TURNS), tokenizer)
    assert runs(tokenizer, example) == ["I am fine.<|im_end|>", "the answer\n\nis four <|im_end|>"]
    assert stops(example, tokenizer)


@pytest.mark.parametrize("name", ["smollm2", "marked"])
def test_a_conversational_prompt_is_not_trained(with_template: Make, templates: dict[str, str], name: str) -> None:
    tokenizer = with_template(templates[name])
    example = tokenize_row(row(prompt=TURNS[:-1], completion=TURNS[-1:]), tokenizer)
    assert runs(tokenizer, example) == ["the answer\n\nis four <|im_end|>"]
    assert example.input_ids.tolist() == tokenize_row(row(messages=TURNS), tokenizer).input_ids.tolist()


def test_a_token_across_the_boundary_is_trained_as_transformers_does(with_template: Make) -> None:
    """Where the template's text and the answer share a token (" the"), the answer cannot be trained without it."""
    source = "{% for m in messages %}{{ m.role + ': ' }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    tokenizer = with_template(source)
    example = tokenize_row(row(messages=[{"role": "assistant", "content": "the answer"}]), tokenizer)
    assert runs(tokenizer, example) == [" the answer"]
    peer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    messages = [{"role": "assistant", "content": "the answer"}]
    out = peer.apply_chat_template(messages, chat_template=source, return_assistant_tokens_mask=True)
    assert example.labels_mask.astype(int).tolist() == out["assistant_masks"]


CONTENT = st.text(min_size=1, max_size=12).filter(lambda text: not text[0].isspace())
"""White space first may join the template's line break in one token, which is trained whole."""


@settings(max_examples=150, deadline=None)
@given(st.lists(CONTENT, min_size=2, max_size=5), st.booleans())
def test_any_content_is_trained_by_the_token(
    plain: Any, trimmed: Any, templates: dict[str, str], contents: list[str], marked: bool
) -> None:
    """Whatever the answers hold (emoji of several tokens, white space that offsets leave out, template syntax), the
    trained runs decode to them, and trimmed offsets make no difference."""
    messages = chat(*contents)
    source = templates["marked" if marked else "smollm2"]
    ours = replace(plain, chat_template=source)
    example = tokenize_row(row(messages=messages), ours)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert runs(ours, example) == [f"{answer}<|im_end|>" for answer in answers]
    other = tokenize_row(row(messages=messages), replace(trimmed, chat_template=source))
    assert other.labels_mask.tolist() == example.labels_mask.tolist()


@pytest.mark.parametrize("answer", ["\ta", " a", "  a", "\n\ta", "a\n", "a ", "a  ", "a\n\n"])
def test_white_space_at_the_ends_of_an_answer(plain: Any, trimmed: Any, templates: dict[str, str], answer: str) -> None:
    """A tokenizer that trims its offsets gives such tokens an empty span: they are trained all the same."""
    unclosed = (
        "{% for m in messages %}{{ m.role + ':' }}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ '<|eot_id|>' }}{% endfor %}"
    )
    for source in (templates["smollm2"], unclosed):
        ours, other = (
            tokenize_row(row(messages=chat("q", answer)), replace(tokenizer, chat_template=source))
            for tokenizer in (plain, trimmed)
        )
        assert ours.labels_mask.tolist() == other.labels_mask.tolist()
        assert runs(plain, ours)[-1].removesuffix("<|im_end|>").endswith(answer)


FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '(thought) ' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Renders the last turn otherwise than the same turn in the middle, as reasoning models' templates do."""


def test_a_template_that_changes_earlier_turns_is_refused(with_template: Make) -> None:
    tokenizer = with_template(FORGETS)
    with pytest.raises(DataError, match=r"a.jsonl: line 7: the chat template renders .* before message 2 otherwise"):
        tokenize_row(row(messages=chat("q", "a", "r", "b")), tokenizer)
    last = tokenize_row(row(messages=chat("q", "a", "r", "b")), tokenizer, loss_on="last")
    assert runs(tokenizer, last) == ["(thought) b<|im_end|>"]


def test_rows_that_cannot_be_masked(plain: Any, with_template: Make, templates: dict[str, str]) -> None:
    def refused(message: str, tokenizer: Any, kind: type[SmedjanError] = DataError, **record: Any) -> None:
        with pytest.raises(kind, match=message) as caught:
            tokenize_row(row(**record), tokenizer)
        assert caught.value.remedy
        assert kind is TokenizerError or (caught.value.file, caught.value.field) == ("a.jsonl", "line 7")

    refused("has no token to train on", plain, messages=chat("only a question"))
    refused("has no token to train on", with_template(templates["marked"]), messages=chat("only a question"))
    refused("begins with an assistant message", plain, messages=chat("q", "a")[1:])
    refused("the chat template refuses these messages", with_template("{{ messages[7].x }}"), messages=chat("q", "a"))
    refused("no chat template.*line 7 is a conversation", with_template(None), TokenizerError, messages=chat("q", "a"))
    refused("does not compile", with_template("{% if %}"), TokenizerError, messages=chat("q", "a"))
    refused("has no EOS token", replace(plain, eos_token=None), TokenizerError, text="Hello")


def test_too_long_rows(plain: Any) -> None:
    short, long = row(1, prompt="the", completion=" answer"), row(2, prompt="the question " * 9, completion="answer")
    example = tokenize_row(long, plain)
    with pytest.raises(DataError, match=rf"a.jsonl: line 2: is {len(example)} tokens long, 8 is the most"):
        tokenize_rows([short, long], plain, max_length=8)
    for too_long in ("drop", "truncate"):
        got = tokenize_rows([short, long], plain, max_length=8, too_long=too_long)  # type: ignore[arg-type]
        assert (got.counts.kept, got.counts.truncated, got.counts.dropped) == (1, 0, 1)
    got = tokenize_rows([short, long], plain, max_length=len(example) - 1, too_long="truncate")
    assert (got.counts.kept, got.counts.truncated, got.counts.dropped, got.counts.unstopped) == (2, 1, 0, 0)
    with pytest.raises(DataError, match="no trained token: all 1 rows are longer than 8 tokens") as caught:
        tokenize_rows([long], plain, max_length=8, too_long="drop")
    assert caught.value.file == "a.jsonl"


@given(st.lists(st.booleans(), min_size=2, max_size=30).filter(lambda mask: any(mask[1:])), st.integers(2, 32))
def test_a_cut_row_keeps_a_prefix_or_goes(mask: list[bool], max_length: int) -> None:
    """Never the answer alone: what remains is the row's beginning, and only if something in it is trained."""
    source = Source(file=Path("a.jsonl"), line=1)
    ids = np.arange(len(mask), dtype=np.int32)
    example = Example(input_ids=ids, labels_mask=np.array(mask), source=source)
    cut = fit(example, max_length=max_length, too_long="truncate")
    assert (cut is None) == (not any(mask[1:max_length]))
    if cut is not None:
        assert cut.input_ids.tolist() == list(range(min(max_length, len(mask))))
        assert cut.labels_mask.tolist() == mask[:max_length]
        assert cut.truncated == (len(mask) > max_length)
    assert (fit(example, max_length=max_length, too_long="drop") is None) == (len(mask) > max_length)


def test_rows_that_cannot_be_masked_are_left_out_when_asked(plain: Any, with_template: Make) -> None:
    """A conversation without an answer, one that the template refuses, and a second BOS; never one that is too long."""
    alternates = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}"
        "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    twice = [{"role": "user", "content": "q"}, *chat("q", "a")]
    rows = [row(1, messages=chat("q", "a")), row(2, messages=chat("q")), row(3, messages=twice)]
    broken = Broken("drop")
    made = tokenize_rows(rows, with_template(alternates), max_length=64, broken=broken)
    assert (made.counts.kept, made.counts.broken, made.first_broken) == (1, 2, broken.first)
    assert "line 2: has no token to train on" in str(made.first_broken)
    with pytest.raises(DataError, match=r"no row is left, 2 are broken; line 2: has no token"):
        tokenize_rows(rows[1:], with_template(alternates), max_length=64, broken=Broken("drop"))
    with pytest.raises(DataError, match="is the most"):
        tokenize_rows([row(1, text="the answer " * 9)], plain, max_length=8, broken=Broken("drop"))


def test_rows_that_never_stop_are_counted(with_template: Make, templates: dict[str, str]) -> None:
    """A tokenizer whose EOS is not what closes a turn: the usual cause of a model that talks on."""
    tokenizer = replace(with_template(templates["llama3"]), eos_token="<|endoftext|>")
    rows = [row(messages=chat("q", "a")), row(messages=chat("q", "a", "r", "b"))]
    assert tokenize_rows(rows, tokenizer, max_length=200).counts.unstopped == 2
    tokenizer = replace(tokenizer, eos_token="<|eot_id|>")
    assert tokenize_rows(rows, tokenizer, max_length=200).counts.unstopped == 0
