"""`smedjan parity DIR`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome, rendered
from smedjan.errors import ConfigError

if TYPE_CHECKING:
    from smedjan.hf.parity import Case, ParityReport


def parity(
    model: Annotated[str, Parameter(help="model directory")],
    /,
    *,
    attention: Annotated[
        tuple[Literal["sdpa", "eager"], ...], Parameter(negative=(), help="of transformers; may be given again")
    ] = ("sdpa", "eager"),
    dtype: Annotated[tuple[Literal["float32", "bfloat16"], ...], Parameter(negative=(), help="may be given again")] = (
        "float32",
        "bfloat16",
    ),
    length: Annotated[
        int, Parameter(help="longest text in tokens; windows that it does not reach past are skipped")
    ] = 128,
    html: Annotated[Path | None, Parameter(help="write a page of the result, too")] = None,
    common: Common = COMMON,
) -> Outcome:
    """Compare logits, cached decoding and gradients with transformers. Any case out of its bound: exit code 1.

    A case that fails is bisected to the first layer and op where the two part. Without --backend, the exact one is
    compared.

    Example: smedjan parity smollm2 --dtype float32
    """
    from smedjan.hf.parity import parity as run

    if length < 1:
        raise ConfigError(f"is {length}", field="length", remedy="give 1 or more")
    backend = "torch_reference" if common.backend == "auto" else common.backend
    report = run(model, attention=attention, dtypes=dtype, backend=backend, length=length)
    fields: dict[str, Any] = {**vars(report), "html": None}
    if html is not None:
        fields["html"] = _page(html, report, model)
    return Outcome(fields=fields, text="\n".join(_lines(report, html)), ok=report.ok)


def _page(html: Path, report: ParityReport, model: str) -> Path:
    from smedjan.report.parity import write_parity

    try:
        return write_parity(html, report, title=Path(model).name)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", file=html, field="html", remedy="check it") from error


def _lines(report: ParityReport, html: Path | None) -> Iterator[str]:
    if report.cases:
        yield _table(report.cases)
    for skip in report.skipped:
        yield f"skipped {skip['name']}: {skip['reason']}"
    for case in report.cases:
        if case.parted is not None:
            near = f"; nearest in transformers: {case.parted.peer}" if case.parted.peer else ""
            yield f"{case.name} parts at {case.parted} ({case.parted.module or 'the model'}{near})"
    if report.cases:
        yield f"{sum(case.equal for case in report.cases)} of {len(report.cases)} cases equal to the bit"
    else:
        yield "nothing was compared"
    failed = sum(not case.holds for case in report.cases)
    if failed:
        yield f"{failed} {'differ' if report.exact else 'out of bound'}"
    if html is not None:
        yield str(html)


def _table(cases: Sequence[Case]) -> str:
    """Coloured on a terminal, plain in a pipe; a line a case, never wrapped."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("case", "tokens", "result", "ulp", "largest", "of"):
        made.add_column(name, no_wrap=True, justify="right" if name in ("tokens", "ulp", "largest") else "left")
    for case in cases:
        off = ("", "", "") if case.equal else (f"{case.max_ulp:,}", f"{case.max_abs:.2g}", case.tensor)
        style = "green" if case.equal else "" if case.holds else "red"
        made.add_row(case.name, str(case.seq), Text(_result(case), style=style), *off)
    return rendered(made, width=240)


def _result(case: Case) -> str:
    if case.equal:
        return "equal"
    if not case.bound:
        return "DIFFERS"
    return f"{'within' if case.holds else 'OUT OF'} {case.bound:.2g}: {case.error:.2g}"
