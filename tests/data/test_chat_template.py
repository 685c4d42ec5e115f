"""Chat templates render as transformers renders them, spans included, and fail as our errors."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from smedjan.data.chat_template import marks_generation, render
from smedjan.errors import DataError, TokenizerError

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is two plus two?"}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello\n\n- a\n- b  "}],
    [
        {"role": "system", "content": "  Be <brief> & 日本語 🙂.\n"},
        {"role": "user", "content": "one {{ 1 + 1 }} {% if x %}"},
        {"role": "assistant", "content": "first", "thinking": "hmm"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "second", "reasoning": "well"},
    ],
]
TOOLS = [{"name": "f", "description": "é <b>", "parameters": {"type": "object", "properties": {}}}]


@pytest.fixture(scope="module")
def peer(plain: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=plain.backend, bos_token=plain.bos_token, eos_token=plain.eos_token)


@pytest.mark.parametrize("name", ["smollm2", "llama3", "marked"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("kw", [{}, {"add_generation_prompt": True}, {"tools": TOOLS}, {"date_string": "26 Jul 2024"}])
def test_text_equals_transformers(
    peer: PreTrainedTokenizerFast, templates: dict[str, str], name: str, conversation: list[dict], kw: dict
) -> None:
    expected = peer.apply_chat_template(conversation, chat_template=templates[name], tokenize=False, **kw)
    text, _ = render(templates[name], conversation, bos_token=peer.bos_token, eos_token=peer.eos_token, **kw)
    assert text == expected


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_spans_are_the_tokens_transformers_masks(
    peer: PreTrainedTokenizerFast, templates: dict[str, str], conversation: list[dict]
) -> None:
    out = peer.apply_chat_template(conversation, chat_template=templates["marked"], return_assistant_tokens_mask=True)
    text, spans = render(templates["marked"], conversation, bos_token=None, eos_token=None)
    masked = [t for t, trained in zip(out["input_ids"], out["assistant_masks"], strict=True) if trained]
    assert peer.decode(masked) == "".join(text[start:end] for start, end in spans)
    assert len(spans) == sum(message["role"] == "assistant" for message in conversation)


BLOCKS = """
  {# a comment #}
  {% for message in messages %}
    {% if message.role == 'user' %}
        U: {{ message.content }}
    {% else %}
  A: {{ message.content }}
    {% endif %}
  {% endfor %}
{{ {'a': '<é>', 'b': [1, none]} | tojson }}
{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ dict(a=1) }} {{ dict.fromkeys(['x'], 0) }}
"""


def test_white_space_of_blocks_and_helpers_equal_transformers(peer: PreTrainedTokenizerFast) -> None:
    for conversation in CONVERSATIONS:
        expected = peer.apply_chat_template(conversation, chat_template=BLOCKS, tokenize=False)
        assert render(BLOCKS, conversation, bos_token=peer.bos_token, eos_token=peer.eos_token) == (expected, [])


def test_only_marked_templates_have_spans(templates: dict[str, str]) -> None:
    assert {name: marks_generation(source) for name, source in templates.items()} == {
        "smollm2": False,
        "llama3": False,
        "marked": True,
    }
    assert marks_generation("{%- generation -%}x{% endgeneration %}")
    assert render(templates["smollm2"], CONVERSATIONS[1], bos_token=None, eos_token=None)[1] == []


def test_absent_specials_are_undefined_as_in_transformers(peer: PreTrainedTokenizerFast) -> None:
    source = "{{ bos_token is defined }}{{ bos_token }}{{ tools is none }}"
    assert render(source, CONVERSATIONS[0], bos_token=None, eos_token=None)[0] == "FalseTrue"
    assert render(source, CONVERSATIONS[0], bos_token="<s>", eos_token=None)[0] == "True<s>True"


def test_the_clock_can_be_pinned() -> None:
    source = "{{ strftime_now('%Y-%m-%d') }}"
    args: dict[str, Any] = {"bos_token": None, "eos_token": None}
    assert render(source, CONVERSATIONS[0], now=datetime(2024, 7, 26), **args)[0] == "2024-07-26"
    assert render(source, CONVERSATIONS[0], **args)[0] == datetime.now().strftime("%Y-%m-%d")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content }}",
        "{{ 'a' + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__init__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ range(10**9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_raises_is_a_data_error(source: str) -> None:
    with pytest.raises(DataError, match="the chat template refuses these messages"):
        render(source, CONVERSATIONS[0], bos_token=None, eos_token=None)
    # and it leaves no trace behind in the cached environment
    assert render("{% generation %}a{% endgeneration %}", CONVERSATIONS[0], bos_token=None, eos_token=None)[1] == [
        (0, 1)
    ]


def test_a_failed_rendering_does_not_spoil_the_next(templates: dict[str, str]) -> None:
    args: dict[str, Any] = {"bos_token": None, "eos_token": None}
    first = render(templates["marked"], CONVERSATIONS[2], **args)
    with pytest.raises(DataError):
        render(templates["marked"], [{"role": "assistant", "content": 3}], **args)
    assert render(templates["marked"], CONVERSATIONS[2], **args) == first


@pytest.mark.parametrize("source", ["{% if %}", "{{ x | nofilter }}", "{% generation %}", "{% include 'a' %}{% for %}"])
def test_a_template_that_does_not_compile(source: str) -> None:
    with pytest.raises(TokenizerError, match="chat_template: does not compile"):
        render(source, CONVERSATIONS[0], bos_token=None, eos_token=None)
