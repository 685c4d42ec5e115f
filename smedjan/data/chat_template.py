"""Chat templates: Jinja source and messages to text, exactly as transformers renders them, in the same sandbox.

A template may mark what the assistant says with `{% generation %} ... {% endgeneration %}`; `render` gives those parts
as character spans [start, end) of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import numpy as np

from smedjan.data.template_bounds import RUN, Run, Span
from smedjan.data.template_sandbox import MAX_SOURCE, ChatEnvironment
from smedjan.errors import DataError, TokenizerError

__all__ = ["Span", "marks_generation", "render"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Where the last message ends, in text that is then cut there; with a space, to see whether the template trims.
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""What running a template over unsuitable messages can raise: its own `raise_exception`, or Python's complaint."""


def marks_generation(template: str) -> bool:
    """Whether the template says by `{% generation %}` which parts are the assistant's."""
    return _GENERATION.search(template) is not None


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    bos_token: str | None,
    eos_token: str | None,
    now: datetime | None = None,
    **kw: Any,
) -> tuple[str, list[Span]]:
    """The text of a conversation and its `{% generation %}` spans, which are [] for a template that has none.

    `continue_final_message` leaves the last message open, for the model to go on with: its `content`, or the field
    that it names. `now` is what the template's `strftime_now` tells (default: the clock); a run that must be
    repeatable pins it. `kw` are further variables of the template (`enable_thinking`, other special tokens, ...).
    Raises TokenizerError for a template that does not compile, DataError for messages that it refuses and for one that
    does what no chat template may.
    """
    if add_generation_prompt and continue_final_message:
        raise _refused("cannot both be continued and get a generation prompt", "choose one of the two")
    for name, rows in (("messages", messages), ("tools", tools or ()), ("documents", documents or ())):
        if not all(isinstance(row, Mapping) for row in rows):
            raise _refused("hold something that is no object", "give a list of objects", name)
    chat = [
        _with_reasoning({str(key): _plain(value) for key, value in message.items() if value is not None})
        for message in messages
    ]
    field = "content" if continue_final_message is True else continue_final_message or None
    final = None if field is None else _tag_final_message(chat, field, template)
    special = {"bos_token": bos_token, "eos_token": eos_token}
    variables: dict[str, Any] = {
        **{name: token for name, token in special.items() if token is not None},
        **{name: _plain(value) for name, value in kw.items()},
        "messages": chat,
        "tools": None if tools is None else _plain(list(tools)),
        "documents": None if documents is None else _plain(list(documents)),
        "add_generation_prompt": add_generation_prompt,
    }
    if now is not None:
        variables["strftime_now"] = now.strftime
    compiled, run = _compile(template), Run()
    token = RUN.set(run)
    try:
        for block in compiled.generate(variables):  # one by one: `{% generation %}` counts what is there
            run.charge(len(block))
            run.blocks.append(block)
    except _TEMPLATE_FAULTS as error:
        raise _refused(
            f"the chat template refuses these messages: {error}",
            "repair the conversation, or use another chat template",
        ) from error
    finally:
        RUN.reset(token)
    text = "".join(run.blocks)
    return (text, run.spans) if final is None else (_cut_at_tag(text, final), [])


def _refused(message: str, remedy: str, field: str = "messages") -> DataError:
    return DataError(message, field=field, remedy=remedy)


def _plain(value: Any) -> Any:
    """JSON's own types alone: a template sees no object with methods of another kind, as in transformers."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """As transformers does: reasoning under any of its names is there under the two that templates read."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tag_final_message(chat: list[dict[str, Any]], field: str, template: str) -> str:
    """Mark where the last message's `field` ends, and give the text that the mark closes."""
    remedy = f"end with a message whose `{field}` the template prints"
    final = chat[-1].get(field) if chat else None
    if final is None:
        raise _refused(f"end without a `{field}` to continue", remedy)
    fields = [name for name in _REASONING if chat[-1].get(name) == final] if field in _REASONING else [field]
    if not any(name in template for name in fields):
        raise _refused(f"are to be continued in `{field}`, which the chat template does not print", remedy)
    if isinstance(final, str):
        for name in fields:
            chat[-1][name] = final + _TAG
        return final
    blocks = final if isinstance(final, list | tuple) else ()
    block = next((item for item in reversed(blocks) if isinstance(item, dict) and "text" in item), None)
    if block is None or not isinstance(block["text"], str):
        raise _refused(f"end with a `{field}` that holds no text to continue", remedy)
    text: str = block["text"]
    block["text"] = text + _TAG
    return text


def _cut_at_tag(text: str, final: str) -> str:
    if final.strip() not in text or _TAG.strip() not in text:
        raise _refused(
            "end with a message that the chat template does not print whole", "give no continued message with it"
        )
    at = text.rindex(_TAG.strip())
    kept = text[:at]
    # A template that trims the message also trims the tag's closing space
    return kept if text[at : at + len(_TAG)] == _TAG else kept.rstrip()


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    if len(template) > MAX_SOURCE:
        raise TokenizerError(
            f"has {len(template)} characters, {MAX_SOURCE} at most are compiled",
            field="chat_template",
            remedy="use another template",
        )
    try:
        return ChatEnvironment().compile_chat(template)
    except (jinja2.TemplateSyntaxError, SyntaxError, ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        message = error.message if isinstance(error, jinja2.TemplateSyntaxError) else str(error)
        raise TokenizerError(
            f"does not compile: {message}{where}",
            field="chat_template",
            remedy="repair the template, or give rows of `prompt` + `completion` strings",
        ) from error
