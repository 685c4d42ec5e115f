"""`write_report`: the page of a run. What a section shows is in sections.py, how marks are drawn in svg.py."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from smedjan.checkpoint.atomic import write_atomic
from smedjan.report.markup import Markup, el
from smedjan.report.model import RunReport
from smedjan.report.page import page
from smedjan.report.scale import duration
from smedjan.report.sections import key_figures, sections


def write_report(path: str | PathLike[str], run: RunReport, *, refresh: int | None = None) -> Path:
    """Write the page of `run` to `path`, whole or not at all."""
    target = Path(path)
    write_atomic(target, render(run, refresh=refresh).encode())
    return target


def render(run: RunReport, *, refresh: int | None = None) -> str:
    """The page as text. With `refresh` it loads itself again after so many seconds: a run that goes on."""
    parts = sections(run)
    links = [el("a", title, href=f"#{name}") for name, title, _ in parts]
    header = el(
        "header",
        el("p", "smedjan · " + ("live" if refresh else "run report"), class_="eyebrow"),
        el("h1", run.title),
        el("p", run.subtitle, class_="subtitle") if run.subtitle else None,
        el("p", _progress(run), class_="subtitle") if refresh else None,
        key_figures(run),
        el("nav", *links, aria_label="Sections") if len(links) > 1 else None,
    )
    main = el("main", *[el("section", body, id=name, aria_labelledby=f"{name}-title") for name, _, body in parts])
    return page(run.title, header, main, _footer(run), refresh=refresh)


def _progress(run: RunReport) -> str:
    """Where a run is that goes on."""
    if not run.steps:
        return "Before its first step."
    last = run.steps[-1]
    total = f" of {run.header.total_steps:,}" if run.header and run.header.total_steps else ""
    left = f", about {duration(last.eta_s)} left" if last.eta_s is not None else ""
    return f"Step {last.step:,}{total}{left}. This page follows the run."


def _footer(run: RunReport) -> Markup:
    notes = [el("p", note) for note in run.notes]
    versions = ", ".join(f"{name} {number}" for name, number in run.versions)
    return el("footer", el("div", *notes, el("p", f"Made with {versions}.") if versions else None))
