"""The marked templates render what the models' own do, byte for byte, and mark what generation would write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from smedjan.data import mask
from smedjan.data.chat_template import marks_generation, render
from smedjan.data.files import Source
from smedjan.data.formats import Row, row_of
from smedjan.data.inspect import inspect_rows
from smedjan.data.mask import tokenize_row
from smedjan.data.training_template import TEMPLATES, known, training_template
from smedjan.errors import DataError
from tests.data.test_chat_families import CONVERSATIONS, VARIANTS
from tests.data.test_mask import runs

NAMES = sorted(file.stem for file in TEMPLATES.glob("*.jinja") if not file.stem.endswith("_training"))
OPEN = {"phi3": "<|assistant|>\n", "phi3_5": "<|assistant|>\n"}
STOP = {"phi3": "<|end|>", "phi3_5": "<|end|>"}


def original(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_bytes().decode()


def rendered(template: str, conversation: list, kw: dict[str, Any]) -> str | None:
    try:
        return render(template, conversation, bos_token="<s>", eos_token="<|endoftext|>", **kw)[0]
    except DataError:
        return None


def test_all_are_found_and_nothing_else() -> None:
    assert len(NAMES) == len(known()) >= 6
    for name in NAMES:
        marked = training_template(original(name))
        assert marked is not None
        assert marks_generation(marked)
        assert not marks_generation(original(name))
        assert training_template(original(name) + " ") is None
        assert training_template(original(name).replace("\n", "\r\n")) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_same_text(name: str) -> None:
    """Every conversation of the families' tests in every variant, those of two tools calls, of reasoning, of tools."""
    template, marked, same = original(name), training_template(original(name)), 0
    assert marked is not None
    for conversation in CONVERSATIONS.values():
        for kw in VARIANTS.values():
            if "continue_final_message" in kw:
                continue
            text = rendered(template, conversation, kw)
            assert rendered(marked, conversation, kw) == text
            same += text is not None
    assert same > 15


def chat(*contents: str, reasoning: str | None = None) -> Row:
    turns: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)
    ]
    if reasoning is not None:
        turns[-1]["reasoning_content"] = reasoning
    return row_of({"messages": turns}, Source(file=Path("a.jsonl"), line=7))


def tokenizer_of(plain: Any, name: str) -> Any:
    """Whose stop token is the one that this family closes a turn with."""
    backend = type(plain.backend).from_str(plain.backend.to_str())
    stop = STOP.get(name, "<|im_end|>")
    backend.add_special_tokens(["<|end|>", "<|assistant|>", "<|user|>"])
    return replace(plain, backend=backend, chat_template=original(name), eos_token=stop)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_of_several_turns(plain: Any, name: str) -> None:
    """Every answer with its stop token; not the header that the generation prompt writes, nor the line break behind.
    Qwen3 thinks in the last turn alone, and its empty thought is the model's to write."""
    tokenizer, stop = tokenizer_of(plain, name), STOP.get(name, "<|im_end|>")
    example = tokenize_row(chat("Hello", "I am fine.", "and?", "four"), tokenizer)
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert runs(tokenizer, example) == [f"I am fine.{stop}", f"{thought}four{stop}"]
    opened = OPEN.get(name, "<|im_start|>assistant\n")
    assert all(run.endswith(opened) for run in runs(tokenizer, example, trained=False)[:2])
    last = tokenize_row(chat("Hello", "I am fine.", "and?", "four"), tokenizer, loss_on="last")
    assert runs(tokenizer, last) == [f"{thought}four{stop}"]


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_transformers_but_for_white_space_behind_the_stop_token(plain: Any, name: str) -> None:
    tokenizer = tokenizer_of(plain, name)
    peer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token=tokenizer.eos_token)
    row = chat("Hello", "I am fine.", "and?", "four", reasoning="why")
    out = peer.apply_chat_template(
        list(row.messages), chat_template=training_template(original(name)), return_assistant_tokens_mask=True
    )
    example = tokenize_row(row, tokenizer)
    assert example.input_ids.tolist() == out["input_ids"]
    break_id = tokenizer.encode("\n", False)[0]
    differ = [
        index
        for index, (ours, theirs) in enumerate(zip(example.labels_mask, out["assistant_masks"], strict=True))
        if ours != theirs
    ]
    assert all(example.input_ids[index] == break_id and not example.labels_mask[index] for index in differ)
    assert len(differ) == 2


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("qwen3", "phi3", "phi3_5")])
def test_prefix_difference_finds_the_same(plain: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, row = tokenizer_of(plain, name), chat("Hello", "I am fine.", "and?", "four\n\nis it")
    marked = tokenize_row(row, tokenizer)
    monkeypatch.setattr(mask, "training_template", lambda template: None)
    assert tokenize_row(row, tokenizer).labels_mask.tolist() == marked.labels_mask.tolist()


@pytest.mark.parametrize("name", ["qwen3", "phi3", "phi3_5"])
def test_several_turns_need_the_marks(plain: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused for a template that differs in a byte. Both are served as they are trained."""
    tokenizer, row = tokenizer_of(plain, name), chat("Hello", "I am fine.", "and?", "four")
    assert inspect_rows([row], tokenizer, max_length=512).trained_tokens > 0
    changed = replace(tokenizer, chat_template=original(name) + "{# #}")
    with pytest.raises(DataError, match="renders the messages before message 2 otherwise"):
        tokenize_row(row, changed)


def test_a_template_that_would_render_otherwise_is_not_used(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is the model's own in any case; then prefix difference says what is trained."""
    tokenizer, row = tokenizer_of(plain, "smollm2"), chat("Hello", "I am fine.")
    expected = tokenize_row(row, tokenizer)
    other = str(training_template(original("smollm2"))).replace("im_end", "im_start")
    monkeypatch.setattr(mask, "training_template", lambda template: other)
    made = tokenize_row(row, tokenizer)
    assert made.input_ids.tolist() == expected.input_ids.tolist()
    assert made.labels_mask.tolist() == expected.labels_mask.tolist()
