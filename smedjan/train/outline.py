"""A run without its arrays: the programs of a step, and what they will need."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from smedjan.backends.base import Forms
from smedjan.graph.program import Program
from smedjan.models.decoder import Form
from smedjan.optim.base import Optimizer, Parameters
from smedjan.runtime.session import Session
from smedjan.train.refused import update_program


class Planned(Protocol):
    """What `planned_bytes` reads: an Outline, or a Trainer."""

    @property
    def session(self) -> Session: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def shapes(self) -> Parameters: ...

    @property
    def update(self) -> Program: ...


class Outline:
    """`session` holds no parameters; `names` are those that would be trained."""

    def __init__(self, *, session: Session, names: Sequence[str], optimizer: Optimizer) -> None:
        assert not session.parameters, "an outline has no arrays"
        self.session, self.names, self.optimizer = session, tuple(names), optimizer
        specs = session.specs()
        self.shapes: Parameters = {name: specs[name] for name in self.names}
        session.reserved = optimizer.state_bytes(self.shapes)

    @cached_property
    def update(self) -> Program:
        return update_program(self.session, self.optimizer, self.shapes)

    def micro(self, form: Form, *, accumulate: bool = False) -> Program:
        return self.session.micro_program(form, self.names, accumulate=accumulate)

    def smallest(self, form: Form, *, accumulate: bool = False) -> Program:
        """The micro-batch where all is given up that can be, if it does not fit otherwise. It is not kept."""
        graph = self.session.micro_graph(form, self.names, accumulate=accumulate)
        return self.session.finish(graph, smallest=True)


def planned_bytes(run: Planned, micro: Program, *, forms: Forms) -> int:
    """What a run takes above its imported libraries, at the larger of two moments: in the micro-batch `micro`, beside
    the optimizer's state, or in the update, beside the weights that are not trained. Both work in one arena. What
    libraries take besides is in both, with what they keep for each of the run's `forms`."""
    update, arena = run.update, max(micro.arena_bytes, run.update.arena_bytes)
    other = set(micro.graph.inputs) - set(update.graph.inputs)
    beside_update = sum(micro.graph.inputs[name].nbytes for name in other)
    at_micro = micro.peak_bytes - micro.arena_bytes + run.optimizer.state_bytes(run.shapes)
    at_update = update.peak_bytes - update.arena_bytes + beside_update
    return max(at_micro, at_update) + arena + run.session.backend.library_bytes(micro, forms)
