"""The templates in chat_templates/ render byte for byte as `transformers.apply_chat_template` does, or are refused too.

They are written after those that the families ship, with the constructs that each uses; `features` has the rest.
"""

from __future__ import annotations

import enum
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from smedjan.data.chat_template import render
from smedjan.data.mask import _tokens_in
from smedjan.errors import DataError

FAMILIES = {file.stem: file.read_text() for file in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}


class Role(enum.StrEnum):
    USER = "user"


CALL = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"city": "Malmö", "n": 2}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "  hi \n"}],
    "system": [
        {"role": "system", "content": "Be brief. /no_think"},
        {"role": "user", "content": "<b>&'\"</b> {{ x }} {% y %} \\n 日本語 🙂"},
    ],
    "several": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "\n<think>\nhm\n</think>\n\nb\n"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": " d ", "reasoning": "why"},
    ],
    "no alternation": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "tool calls": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": '{"t": -3.5}'},
        {"role": "assistant", "content": "Cold.", "thinking": None},
    ],
    "two calls": [
        {"role": "user", "content": "w"},
        {"role": "assistant", "content": "x", "tool_calls": [CALL, {**CALL, "id": "short"}]},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "image"}]}],
    "hidden": [{"role": "hidden", "content": "h"}, {"role": "user", "content": "u"}, {"role": "stop", "content": "s"}],
    "odd types": [{"role": Role.USER, "content": "hi", "n": np.int64(3), "when": datetime(2024, 1, 2), "flag": True}],
    "no content": [{"role": "user"}],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "é <b> 'q'",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "l": {"type": "array", "items": {"type": ["number", "null"]}}},
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompt": {"add_generation_prompt": True},
    "tools": {"tools": [TOOL, TOOL], "add_generation_prompt": True},
    "documents": {"documents": [{"title": "t", "text": "x\ny"}, {"title": "u", "text": "z"}]},
    "variables": {
        "enable_thinking": False,
        "date_string": "1 Jan 2025",
        "builtin_tools": ["weather", "code_interpreter"],
        "controls": {"length": "short", "citations": np.bool_(True)},
        "add_generation_prompt": True,
    },
    "continued": {"continue_final_message": True},
    "reasoning continued": {"continue_final_message": "reasoning_content"},
}


@pytest.fixture(scope="module")
def peer(plain: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend, bos_token=plain.bos_token, eos_token=plain.eos_token, pad_token="<|im_start|>"
    )


def theirs(peer: PreTrainedTokenizerFast, conversation: list[dict], template: str, kw: dict) -> str | None:
    """transformers' text, or None where it raises one of the errors of a template that meets such messages."""
    try:
        text = peer.apply_chat_template(conversation, chat_template=template, tokenize=False, **kw)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_conversation_in_every_variant(peer: PreTrainedTokenizerFast, family: str) -> None:
    template, rendered, refused = FAMILIES[family], 0, 0
    for name, conversation in CONVERSATIONS.items():
        for variant, kw in VARIANTS.items():
            before = str(conversation)
            expected = theirs(peer, conversation, template, kw)
            arguments = {"bos_token": peer.bos_token, "eos_token": peer.eos_token, "pad_token": peer.pad_token, **kw}
            if expected is None:
                with pytest.raises(DataError) as caught:
                    render(template, conversation, **arguments)
                assert caught.value.field in ("messages", "tools"), (name, variant)
                assert "\n" not in str(caught.value)
                refused += 1
            else:
                assert render(template, conversation, **arguments)[0] == expected, (name, variant)
                rendered += 1
            assert str(conversation) == before
    # Both outcomes were met: a template that refuses all, or transformers changing its errors, would hide everything
    assert rendered > 20
    assert refused > 5


@pytest.mark.parametrize("family", ["smollm3", "features"])
def test_generation_marks_are_the_same_tokens(peer: PreTrainedTokenizerFast, plain: Any, family: str) -> None:
    masked = 0
    for name in ("several", "system", "hidden"):
        conversation = CONVERSATIONS[name]
        out = peer.apply_chat_template(
            conversation, chat_template=FAMILIES[family], return_assistant_tokens_mask=True, return_dict=True
        )
        text, spans = render(FAMILIES[family], conversation, bos_token=peer.bos_token, eos_token=peer.eos_token)
        ids, offsets = plain.encode_with_offsets(text, False)
        assert ids == out["input_ids"]
        ours = {index for span in spans for index in _tokens_in(span, offsets)}
        assert [int(index in ours) for index in range(len(ids))] == out["assistant_masks"]
        masked += len(ours)
    assert masked > 10


CONTINUED = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"


@pytest.mark.parametrize("content", ["open", "open  ", "  open", "a ] b", [{"type": "text", "text": "t "}, {"x": 1}]])
def test_continued_messages_are_cut_where_they_end(peer: PreTrainedTokenizerFast, content: Any) -> None:
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    kw = {"continue_final_message": True}
    for template in (CONTINUED, CONTINUED.replace("| trim", "if m.content is string else m.content[0].text")):
        expected = theirs(peer, conversation, template, kw)
        if expected is None:
            with pytest.raises(DataError):
                render(template, conversation, bos_token=None, eos_token=None, **kw)
        else:
            assert render(template, conversation, bos_token=None, eos_token=None, **kw)[0] == expected


@pytest.mark.parametrize(
    ("messages", "kw"),
    [
        ([], {"continue_final_message": True}),
        ([{"role": "user", "content": ""}], {"continue_final_message": "nowhere"}),
        ([{"role": "user", "content": "x"}], {"continue_final_message": True, "add_generation_prompt": True}),
        ([{"role": "user", "content": "x"}], {"tools": ["no object"]}),
        ([{"role": "user", "content": "x"}], {"documents": [3]}),
        (["no object"], {}),
    ],
)
def test_what_no_template_could_render(messages: Any, kw: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        render(CONTINUED, messages, bos_token=None, eos_token=None, **kw)
