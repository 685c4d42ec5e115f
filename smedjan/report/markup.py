"""HTML and SVG by construction: text is escaped unless it is already markup, so that no section can forget to.

>>> el("p", "a < b", el("b", "!"), class_="note")
'<p class="note">a &lt; b<b>!</b></p>'
"""

from __future__ import annotations

import html
import re

_VOID = frozenset({"meta", "link", "br", "hr", "img"})
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What HTML forbids or UTF-8 cannot hold: model output and data files may contain it."""

Attribute = str | int | float | None


class Markup(str):
    """Text that is markup already. Only this module and constants of ours make it."""

    __slots__ = ()


Child = str | Markup | None


def el(name: str, *children: Child, **attributes: Attribute) -> Markup:
    """One element. A trailing underscore is dropped from an attribute's name, other underscores become hyphens."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        assert not children, f"<{name}> takes no children"
        return Markup(f"<{name}{pairs}>")
    return Markup(f"<{name}{pairs}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children if child))


def escape(text: str) -> str:
    return html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True)


def _text(value: str | int | float) -> str:
    # Two decimals place a mark to a fiftieth of a pixel.
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
