"""`write_report`: one HTML file that needs nothing else. No script, no font, no image from elsewhere.

What a section shows is in sections.py, how marks are drawn in svg.py. A Content-Security-Policy in the page forbids
scripts and every request, whatever a notice or a model's answer may contain.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from smedjan.checkpoint.atomic import write_atomic
from smedjan.report.markup import Markup, el, join
from smedjan.report.model import RunReport
from smedjan.report.sections import key_figures, sections
from smedjan.report.style import CSS

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(path: str | PathLike[str], run: RunReport) -> Path:
    """Write the page of `run` to `path`, whole or not at all."""
    target = Path(path)
    write_atomic(target, render(run).encode())
    return target


def render(run: RunReport) -> str:
    """The page as text."""
    parts = sections(run)
    links = [el("a", title, href=f"#{name}") for name, title, _ in parts]
    header = el(
        "header",
        el("p", "smedjan · run report", class_="eyebrow"),
        el("h1", run.title),
        el("p", run.subtitle, class_="subtitle") if run.subtitle else None,
        key_figures(run),
        el("nav", *links, aria_label="Sections") if len(links) > 1 else None,
    )
    main = el("main", *[el("section", body, id=name, aria_labelledby=f"{name}-title") for name, _, body in parts])
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name_="generator", content="smedjan"),
        el("title", f"{run.title} · smedjan"),
        # CSS is ours and holds no markup; escaped, its quotes would not be CSS.
        el("style", Markup(CSS)),
    )
    body = el("body", header, main, _footer(run))
    return "<!doctype html>\n" + el("html", join(head, "\n", body), lang="en") + "\n"


def _footer(run: RunReport) -> Markup:
    notes = [el("p", note) for note in run.notes]
    versions = ", ".join(f"{name} {number}" for name, number in run.versions)
    return el("footer", el("div", *notes, el("p", f"Made with {versions}.") if versions else None))
