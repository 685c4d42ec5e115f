"""Chat templates: Jinja source and messages to text, exactly as transformers renders them, in the same sandbox.

A template may mark what the assistant says with `{% generation %} ... {% endgeneration %}`; `render` gives those parts
as character spans [start, end) of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from smedjan.errors import DataError, TokenizerError

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What running a template over unsuitable messages can raise: its own `raise_exception`, or Python's complaint."""


def marks_generation(template: str) -> bool:
    """Whether the template says by `{% generation %}` which parts are the assistant's."""
    return _GENERATION.search(template) is not None


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    bos_token: str | None,
    eos_token: str | None,
    now: datetime | None = None,
    **kw: Any,
) -> tuple[str, list[Span]]:
    """The text of a conversation and its `{% generation %}` spans, which are [] for a template that has none.

    `now` is what the template's `strftime_now` tells (default: the clock); a run that must be repeatable pins it. `kw`
    are further variables of the template (`tools`, `documents`, `enable_thinking`, ...).
    Raises TokenizerError for a template that does not compile, DataError for messages that it refuses.
    """
    special = {"bos_token": bos_token, "eos_token": eos_token}
    variables: dict[str, Any] = {
        "tools": None,
        "documents": None,
        **{name: token for name, token in special.items() if token is not None},
        **kw,
        "messages": [_with_reasoning(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
    }
    if now is not None:
        variables["strftime_now"] = now.strftime
    compiled = _compile(template)
    blocks: list[str] = []
    spans: list[Span] = []
    try:
        with compiled.environment.track_generation(blocks, spans):  # type: ignore[attr-defined]
            for block in compiled.generate(variables):  # one by one: the tracker counts what is there
                blocks.append(block)
    except _TEMPLATE_FAULTS as error:
        raise DataError(
            f"the chat template refuses these messages: {error}",
            field="messages",
            remedy="repair the conversation, or use another chat template",
        ) from error
    return "".join(blocks), spans


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers does: reasoning under any of its names is there under the two that templates read."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _GenerationTracker(Extension):
    """`{% generation %}`: renders its body as it is and notes where in the text it lies."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(track_generation=self.track_generation)
        self._blocks: list[str] | None = None
        self._spans: list[Span] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        assert self._blocks is not None, "a generation block outside of render"
        start = sum(map(len, self._blocks))
        self._spans.append((start, start + len(text)))
        return text

    @contextmanager
    def track_generation(self, blocks: list[str], spans: list[Span]) -> Iterator[None]:
        assert self._blocks is None, "render is not reentrant"
        self._blocks, self._spans = blocks, spans
        try:
            yield
        finally:
            self._blocks, self._spans = None, []


class _TemplateDict:
    """`dict` for templates: what it makes, without the attributes through which a sandbox is left."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace` for templates: no name may begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named parameter, so that `namespace(self=...)` stays possible, as in Jinja's own
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a template may not store the name {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    # One environment a template: the tracker is the environment's
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTracker, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _TemplateNamespace
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(
            f"does not compile: {error.message} (line {error.lineno})",
            field="chat_template",
            remedy="repair the template, or give rows of `prompt` + `completion` strings",
        ) from error
