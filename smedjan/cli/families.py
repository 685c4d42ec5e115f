"""`smedjan families`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome, table

if TYPE_CHECKING:
    from smedjan.hf.families import FamiliesReport, Row

MODES = ("logits", "gradients", "decode", "round trip")
SHORT = {"float32": "f32", "bfloat16": "bf16"}


def families(
    *,
    family: Annotated[tuple[str, ...], Parameter(negative=(), help="one model_type; may be given again")] = (),
    markdown: Annotated[bool, Parameter(negative=(), help="print README's table")] = False,
    common: Common = COMMON,
) -> Outcome:
    """Prove every family: a tiny random model of each beside transformers. What does not hold: exit code 1.

    Each model is made by transformers, imported, compared (logits, gradients, cached decoding), and loaded by
    transformers from what was written. A cell counts the cases that hold, one for each attention and padding. Without
    --backend, the exact one is compared, where to hold is to be equal to the bit. About a minute in all.

    Example: smedjan families --family mistral
    """
    from smedjan.hf.families import prove

    backend = "torch_reference" if common.backend == "auto" else common.backend
    report = prove(family, backend=backend, on_row=lambda row: common.note(f"{row.family} {row.dtype}"))
    text = markdown_table(report.rows) if markdown else "\n".join(_lines(report))
    return Outcome(fields=vars(report), text=text, ok=report.ok)


def markdown_table(rows: tuple[Row, ...]) -> str:
    """A line a family, a column for each mode and dtype."""
    dtypes = tuple(dict.fromkeys(row.dtype for row in rows))
    head = ["family", "attention", *(f"{mode}, {SHORT[dtype]}" for mode in MODES for dtype in dtypes)]
    lines = [_line(head), _line(["---"] * len(head))]
    for name in dict.fromkeys(row.family for row in rows):
        found = {row.dtype: row for row in rows if row.family == name}
        cells = [found[dtype].cells()[mode] for mode in range(len(MODES)) for dtype in dtypes]
        attention = dict.fromkeys(each for row in found.values() for each in row.attention)
        lines.append(_line([f"`{name}`", ", ".join(attention), *cells]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _lines(report: FamiliesReport) -> Iterator[str]:
    head = ("family", "dtype", "attention", *MODES)
    yield table(head, [(row.family, row.dtype, ", ".join(row.attention), *row.cells()) for row in report.rows])
    for skip in report.skipped:
        yield f"skipped {skip['name']}: {skip['reason'].split('. ')[0]}"
    for row in report.rows:
        for problem in row.problems:
            yield f"{row.family} {row.dtype}: {problem}"
    good = sum(row.ok for row in report.rows)
    yield f"{good} of {len(report.rows)} {'equal to the bit' if report.exact else 'within bound'}"
