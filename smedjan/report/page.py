"""The shell of every page: one HTML file that needs nothing else. No script, no font, no image from elsewhere.

A Content-Security-Policy in the page forbids scripts and every request, whatever a notice or a model's answer may
contain.
"""

from __future__ import annotations

from smedjan.report.markup import Markup, el, join
from smedjan.report.style import CSS

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, *body: Markup | None, css: str = "", refresh: int | None = None) -> str:
    """The text of a page with this body. `css` is ours too, and follows the style that all pages share. `refresh`:
    the browser loads the page again after so many seconds."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name_="generator", content="smedjan"),
        el("meta", http_equiv="refresh", content=refresh) if refresh else None,
        el("title", f"{title} · smedjan"),
        # CSS is ours and holds no markup; escaped, its quotes would not be CSS.
        el("style", Markup(CSS + css)),
    )
    return "<!doctype html>\n" + el("html", join(head, "\n", el("body", *body)), lang="en") + "\n"
