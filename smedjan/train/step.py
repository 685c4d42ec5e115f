"""One optimizer step: micro-batches, accumulation, clip and update, all on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from smedjan.backends.base import Array
from smedjan.backends.collective import Alone, Collective
from smedjan.checkpoint.dtype import convert, to_float32
from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.shared import shares
from smedjan.data.collate import Batch
from smedjan.graph.tensor import Spec
from smedjan.optim.base import COPIES, Optimizer
from smedjan.optim.sophia import Sophia
from smedjan.runtime.session import Session
from smedjan.train.hessian import Hessian
from smedjan.train.refused import update_program

MASK32 = 0xFFFFFFFF


class Trainer:
    """Trains `names` of a session's parameters. `state` holds the optimizer's arrays as `exp_avg.NAME`, ...

    Each process of `group` holds all of it and makes the same update, of gradients that they make together.
    """

    def __init__(
        self,
        session: Session,
        names: Sequence[str],
        optimizer: Optimizer,
        *,
        seed: int = 0,
        group: Collective | None = None,
    ) -> None:
        self.session, self.names, self.optimizer, self.seed = session, tuple(names), optimizer, seed
        self.group = group or Alone()
        specs = session.specs()
        self.shapes = {name: specs[name] for name in self.names}
        session.reserved = optimizer.state_bytes(self.shapes)
        self.update = update_program(session, optimizer, self.shapes)
        self.hessian = Hessian(session, optimizer, self.shapes) if isinstance(optimizer, Sophia) else None
        self.state: dict[str, Array] = {
            name: self._copy(name.partition(".")[2])
            if name.partition(".")[0] in COPIES
            else session.backend.zeros(shape, dtype)
            for name, (shape, dtype) in optimizer.state(self.shapes).items()
        }

    def _copy(self, name: str) -> Array:
        """The float32 copy of a parameter, exact: every narrower number is one of float32."""
        backend = self.session.backend
        return backend.from_raw(convert(backend.to_raw(self.session.parameters[name]), "float32"))

    def step(
        self, batches: Sequence[Batch], *, number: int, lr: float, taken: int | None = None
    ) -> tuple[float, float]:
        """Step `number` (from 1) over its micro-batches: loss (mean over the step's trained tokens), gradient norm.

        Every micro-batch's loss is divided by the trained tokens of the whole step, so that how the rows are split
        cannot change it. A norm that is not finite changes neither weights nor state. The optimizer counts this step as
        its `taken`th where earlier ones were skipped.
        """
        taken = number if taken is None else taken
        if self.hessian is not None and self.hessian.due(taken):
            # Before the step's own gradients: a planned program's next run would write over them.
            key = (self.seed & MASK32, self.seed >> 32, number, 0)
            self.state.update(self.hessian.estimate(self.session, self.state, batches[0], key=key))
        losses, grads = self.losses_and_grads(batches, number=number)
        made = self.update(self._inputs(grads, taken, lr))
        self.session.flops += self.update.cost.flops
        for name in self.names:
            self.session.parameters[name] = made[name]
        self.state = {name: made[name] for name in self.state}
        return sum(self._float(loss) for loss in losses), self._float(made["grad_norm"])

    def losses_and_grads(
        self, batches: Sequence[Batch], *, number: int
    ) -> tuple[Sequence[float | Array], Mapping[str, Array]]:
        """The micro-batches' losses, which add up to the step's, and its gradients, in every process alike. One process
        leaves losses on the device, and waits for nothing. Micro-batch m is process m % world's.

        An exact backend adds whole gradients in the order of the micro-batches, as one process would: how many there
        are changes no bit. On a fast one each process adds up its own, and the sums are summed: of M micro-batches'
        gradients g_m that is another order, and two orders of float32 differ by at most 2 (M - 1) u sum |g_m|.
        """
        session, group, specs = self.session, self.group, self.shapes
        num_items = sum(batch.trained_tokens for batch in batches)
        assert num_items > 0, "a step without a trained token"
        ordered = session.backend.exact and group.world > 1
        totals: Mapping[str, Array] | None = None
        losses = []
        for first in range(0, len(batches), group.world):
            micro, grads = first + group.rank, None
            if micro < len(batches):
                key = (self.seed & MASK32, self.seed >> 32, number, micro)
                given = None if ordered else totals
                loss, grads = session.micro(
                    batches[micro], self.names, num_items=num_items, totals=given, dropout_key=key
                )
                losses.append(loss)
            if ordered:
                totals = group.add(totals, grads, specs, min(group.world, len(batches) - first))
            else:
                totals = grads or totals
        if group.world > 1:
            # Before the sum: what stopped another process comes out here
            losses = interleaved(group.exchange([self._float(loss) for loss in losses]))
        if not ordered:
            totals = group.sum(totals, specs)
        assert totals is not None
        return losses, totals

    def _inputs(self, grads: Mapping[str, Array], number: int, lr: float) -> dict[str, Any]:
        backend = self.session.backend
        scalars = self.optimizer.scalars(self.shapes, lr=lr, step=number, seed=self.seed)
        return {
            **{name: self.session.parameters[name] for name in self.names},  # a master stands in for its own
            **{f"grad.{name}": array for name, array in grads.items()},
            **self.state,
            **{name: backend.scalar(value) for name, value in scalars.items()},
        }

    def _float(self, scalar: float | Array) -> float:
        if isinstance(scalar, float):
            return scalar
        return float(to_float32(self.session.backend.to_raw(scalar))[0])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the session's parameters are the mean of the weights, each in its dtype, where one is kept."""
        parameters = self.session.parameters
        raw = {name: parameters[name] for name in self.names}
        try:
            if self.optimizer.ema:
                for name in self.names:
                    mean = self.session.backend.to_raw(self.state[f"ema.{name}"])
                    parameters[name] = self.session.backend.from_raw(convert(mean, self.shapes[name][1]))
            yield
        finally:
            parameters.update(raw)

    def weights(self) -> dict[str, RawTensor]:
        """The trained parameters, on the host."""
        return {name: self.session.backend.to_raw(self.session.parameters[name]) for name in self.names}

    def all_weights(self) -> dict[str, RawTensor]:
        """Those and the frozen ones, in the model's order."""
        return {name: self.session.backend.to_raw(array) for name, array in self.session.parameters.items()}

    def optimizer_state(self) -> dict[str, RawTensor]:
        """This process's share of it, on the host: all of it, where there is one."""
        specs = {name: Spec(*kept) for name, kept in self.optimizer.state(self.shapes).items()}
        mine = shares({name: spec.nbytes for name, spec in specs.items()}, self.group.world)[self.group.rank]
        return {name: self.session.backend.to_raw(self.state[name]) for name in mine}

    def restore(self, weights: Mapping[str, RawTensor], state: Mapping[str, RawTensor]) -> None:
        """Takes over a checkpoint's tensors, whichever backend wrote them."""
        from_raw = self.session.backend.from_raw
        self.session.parameters.update({name: from_raw(weights[name]) for name in self.names})
        self.state = {name: from_raw(state[name]) for name in self.state}


def interleaved(shares: Sequence[Sequence[float]]) -> list[float]:
    """What was dealt out to the processes one by one, in the first order."""
    return [share[turn] for turn in range(max(map(len, shares))) for share in shares if turn < len(share)]
