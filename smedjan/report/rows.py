"""`write_rows`: the page of an inspection of data. One HTML file that needs nothing else: the trained tokens stand out,
each token shows its id, and what was kept, cut and dropped is said above them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from smedjan.checkpoint.atomic import write_atomic
from smedjan.data.inspect import Inspection, Piece, Sample
from smedjan.report.markup import Markup, el
from smedjan.report.page import page

_CSS = """
.row { margin: 0 0 1.6rem; padding: .9rem 1rem; border: 1px solid var(--rule); border-radius: .4rem;
  font: .86rem/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.row span { border-bottom: 1px solid var(--rule); color: var(--muted); }
.row span.trained { color: var(--ink); background: color-mix(in srgb, var(--ours) 22%, transparent);
  border-bottom: 2px solid var(--ours); }
"""


def write_rows(path: str | PathLike[str], found: Inspection, *, title: str) -> Path:
    """Write the page of `found` to `path`, whole or not at all."""
    target = Path(path)
    write_atomic(target, render(found, title=title).encode())
    return target


def render(found: Inspection, *, title: str) -> str:
    """The page as text."""
    header = el(
        "header",
        el("p", "smedjan · rows as tokens", class_="eyebrow"),
        el("h1", title),
        el("p", "What is marked is what the model is taught to say. A token shows its id.", class_="subtitle"),
    )
    facts = el("dl", *[part for name, value in figures(found) for part in (el("dt", name), el("dd", value))])
    facts = el("section", el("div", facts, class_="facts"))
    return page(title, header, el("main", facts, *map(_sample, found.samples)), css=_CSS)


def figures(found: Inspection) -> list[tuple[str, str]]:
    """(name, value) of everything that is counted, as a person reads it."""
    counts, lengths = found.counts, found.lengths
    made = [
        ("rows", ", ".join(f"{count:,} {name}" for name, count in counts.rows.items())),
        ("tokens", f"{found.tokens:,}, trained {found.trained_tokens:,} ({found.trained_share:.1%})"),
        ("length", f"{lengths.min:,} to {lengths.max:,}, median {lengths.median:,}, 95 % up to {lengths.p95:,}"),
        ("longest", f"{found.longest:,} before any was cut or dropped"),
    ]
    if counts.unstopped:
        made.append(("no stop", f"{counts.unstopped:,} rows train no stop token at their end"))
    return made


def _sample(sample: Sample) -> Markup:
    cut = ", truncated" if sample.truncated else ""
    return el("section", el("h2", f"{sample.source}{cut}"), el("div", *map(_piece, sample.pieces), class_="row"))


def _piece(piece: Piece) -> Markup:
    title = " ".join(map(str, piece.ids))
    # A line end that is a token shows before it ends the line.
    text = piece.text.replace("\n", "\u23ce\n")
    return el("span", text or "\u2205", title=title, class_="trained" if piece.trained else None)
