"""Jinja for chat templates: the sandbox of transformers' `apply_chat_template`, with its work bounded besides.

Loops count their rounds; operators, filters, string methods and printing are weighed before they make anything
(`template_bounds`). Beyond a bound is a SecurityError; below, every template renders as it does in transformers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from smedjan.data.template_bounds import (
    FILTERS,
    MAX_INTEGER_BITS,
    METHODS,
    RUN,
    length,
    listed,
    made,
    weigh,
    weigh_format,
)

MAX_SOURCE = 1 << 20
"""Characters of a template; real ones have some thousand."""


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, weighed. Jinja marks those that take its context or environment before the value."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0
    weigh = FILTERS.get(name)

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        RUN.get().step()
        if name in ("join", "sum"):
            args = (*args[:skip], listed(args[skip]), *args[skip + 1 :])
        if weigh is not None:
            weigh(*args[skip:], **kwargs)
        return made(function(*args, **kwargs))

    return bounded


class _Counted:
    """What a loop goes through, a step a round."""

    def __init__(self, items: Any, characters: int) -> None:
        self._items, self._characters = items, characters

    def __iter__(self) -> Iterator[Any]:
        run = RUN.get()
        for item in self._items:
            run.step(self._characters)
            yield item

    def __len__(self) -> int:
        # TypeError where there is none, as `loop.length` expects
        return len(self._items)


class _ChatExtension(Extension):
    """`{% generation %}`, which renders its body as it is and notes where it lies, and what `_Bounds` calls."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    def note(self, caller: Callable[[], str]) -> str:
        text, run = caller(), RUN.get()
        start = sum(map(len, run.blocks))
        run.spans.append((start, start + len(text)))
        return text

    def counted(self, items: Any, characters: int) -> _Counted:
        return _Counted(items, characters)

    def joined(self, *parts: Any) -> str:
        for part in parts:
            weigh(part)
        return "".join(map(str, parts))

    def sliced(self, value: Any) -> Any:
        return made(value)


class _Bounds(NodeTransformer):
    """Puts the weighing where Jinja calls nothing of the environment: loops, `~` and slices."""

    def __init__(self, extension: _ChatExtension) -> None:
        self.extension = extension

    def _call(self, name: str, args: list[nodes.Expr], node: nodes.Node) -> nodes.Expr:
        return self.extension.call_method(name, args, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        size = nodes.Const(sum(map(_written, (*node.body, *node.else_))), lineno=node.lineno)
        self.generic_visit(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = self._call("counted", [node.iter, size], node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("joined", node.nodes, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._call("sliced", [node], node) if isinstance(node.arg, nodes.Slice) else node


def _written(node: nodes.Node) -> int:
    """Characters that stand in a node, without those of the loops in it, which count their own."""
    if isinstance(node, nodes.For):
        return 0
    own = node.data if isinstance(node, nodes.TemplateData) else node.value if isinstance(node, nodes.Const) else ""
    return (len(own) if isinstance(own, str) else 0) + sum(map(_written, node.iter_child_nodes()))


@jinja2.pass_context
def _printed(_: Context, value: Any) -> Any:
    weigh(value)
    return value


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of transformers' `apply_chat_template`, bounded."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    written = 0
    """Characters of the template that a call of a macro can print."""

    def __init__(self) -> None:
        # Unoptimized, and printing by way of the context: nothing of a template runs before it is rendered.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_ChatExtension, loopcontrols],
            finalize=_printed,
            optimized=False,
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        # Makes text without end, and no chat wants it
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace

    def compile_chat(self, source: str) -> jinja2.Template:
        tree = self.parse(source)
        self.written = len(source)
        extension = self.extensions[_ChatExtension.identifier]
        assert isinstance(extension, _ChatExtension)
        _Bounds(extension).visit(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str | list | tuple):
            RUN.get().charge(length(left) + length(right))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    RUN.get().charge(len(one) * max(other, 0))
        elif operator == "%" and isinstance(left, str):
            weigh_format(left, (right,), {})
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INTEGER_BITS:
                raise SecurityError(f"it makes a number of {bits} bits")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            weigh_format(value.__self__, args, kwargs)
            return str(made(wrapped(*args, **kwargs)))

        return bounded

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        RUN.get().step(self.written if isinstance(obj, Macro | BlockReference) else 0)
        if isinstance(obj, LoopContext) and args:
            args = (_Counted(args[0], self.written), *args[1:])
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name in METHODS:
            if name == "join" and args:
                args = (listed(args[0]), *args[1:])
            METHODS[name](owner, *args, **kwargs)
        return made(super().call(context, obj, *args, **kwargs))


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
        raise SecurityError(f"a template may not store the name {name!r}")


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
