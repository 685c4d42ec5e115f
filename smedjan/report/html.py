"""`write_report`: the page of a run. What a section shows is in sections.py, how marks are drawn in svg.py."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from smedjan.checkpoint.atomic import write_atomic
from smedjan.report.markup import Markup, el
from smedjan.report.model import RunReport
from smedjan.report.page import page
from smedjan.report.sections import key_figures, sections


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
    return page(run.title, header, main, _footer(run))


def _footer(run: RunReport) -> Markup:
    notes = [el("p", note) for note in run.notes]
    versions = ", ".join(f"{name} {number}" for name, number in run.versions)
    return el("footer", el("div", *notes, el("p", f"Made with {versions}.") if versions else None))
