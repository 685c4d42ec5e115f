"""What a backend cannot do of a run: the flag that asked for it, and who can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from smedjan.errors import BackendError, ConfigError
from smedjan.graph.program import Program
from smedjan.optim.base import Optimizer, Parameters
from smedjan.runtime.session import Session

EVERYWHERE = "--backend torch_reference or cpu_native"
"""They have all of an optimizer's ops: one is the oracle of the others, the other one is made over it."""

LEAVE_OUT = ", or leave it out"


def update_program(session: Session, optimizer: Optimizer, shapes: Parameters) -> Program:
    """The optimizer's step on the session's backend. Narrow state that it has no ops for is an error of its flag."""
    exact = session.backend.exact
    try:
        return session.finish(optimizer.graph(shapes, exact=exact, buckets=not exact))
    except BackendError as error:
        narrow = optimizer.state_dtype in ("8bit", "bfloat16")
        if error.field in ("quantize_blocks", "dequantize_blocks") or (error.field == "stochastic_round" and narrow):
            field, what = "optim.state", f"{optimizer.state_dtype} state of {type(optimizer).__name__}"
        elif error.field == "stochastic_round":
            field, what = "optim.rounding", f"stochastic rounding of {type(optimizer).__name__}'s weights"
        else:
            raise
        raise BackendError(
            f"{session.backend.name} has no lowering for the op {error.field!r}, which {what} needs",
            field=field,
            remedy=f"give {EVERYWHERE}{LEAVE_OUT}",
        ) from error


@contextmanager
def going_on(resume: bool) -> Iterator[None]:
    """A flag is part of a run that was started with it: no remedy to `resume` without it would be one. The backend is
    not: it may be that of the machine which the run has left."""
    try:
        yield
    except (BackendError, ConfigError) as error:
        if resume and error.field == "backend":
            elsewhere = f"{error.remedy}, or go on with another --backend"
            raise type(error)(error.message, file=error.file, field=error.field, remedy=elsewhere) from error
        if not resume or not (error.remedy or "").endswith(LEAVE_OUT):
            raise
        remedy = (error.remedy or "").removesuffix(LEAVE_OUT).replace("give ", "go on with ", 1)
        raise type(error)(
            f"the run was started with it, and {error.message}", file=error.file, field=error.field, remedy=remedy
        ) from error
