"""`smedjan parity DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome, table

if TYPE_CHECKING:
    from smedjan.hf.parity import Case


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
    common: Common = COMMON,
) -> Outcome:
    """Compare logits, cached decoding and gradients with transformers. Any case out of its bound: exit code 1.

    Without --backend, the exact one is compared.

    Example: smedjan parity smollm2 --dtype float32
    """
    from smedjan.hf.parity import parity as run

    backend = "torch_reference" if common.backend == "auto" else common.backend
    report = run(model, attention=attention, dtypes=dtype, backend=backend)
    for skip in report.skipped:
        common.note(f"skipped {skip['name']}: {skip['reason']}")
    equal = sum(case.equal for case in report.cases)
    text = f"{_table(report.cases)}\n{equal} of {len(report.cases)} cases equal to the bit" if report.cases else ""
    if not report.ok:
        text += f"\n{sum(not case.holds for case in report.cases)} out of bound"
    return Outcome(fields=vars(report), text=text, ok=report.ok)


def _table(cases: Sequence[Case]) -> str:
    head = ("case", "attention", "dtype", "mode", "padding", "result")
    rows = [(case.name, case.attention, case.dtype, case.mode, case.padding, _result(case)) for case in cases]
    return table(head, rows)


def _result(case: Case) -> str:
    if case.equal:
        return "equal"
    return f"{'within' if case.holds else 'OUT OF'} {case.bound:.2g}: {case.error:.2g}, {case.max_ulp} ulp"
