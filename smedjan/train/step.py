"""One optimizer step: micro-batches, accumulation, clip and update, all on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from smedjan.backends.base import Array
from smedjan.checkpoint.dtype import convert, to_float32
from smedjan.checkpoint.raw import RawTensor
from smedjan.data.collate import Batch
from smedjan.optim.base import COPIES, Optimizer
from smedjan.optim.sophia import Sophia
from smedjan.runtime.session import Session
from smedjan.train.hessian import Hessian

MASK32 = 0xFFFFFFFF


class Trainer:
    """Trains `names` of a session's parameters. `state` holds the optimizer's arrays as `exp_avg.NAME`, ..."""

    def __init__(self, session: Session, names: Sequence[str], optimizer: Optimizer, *, seed: int = 0) -> None:
        self.session, self.names, self.optimizer, self.seed = session, tuple(names), optimizer, seed
        specs = session.specs()
        self.shapes = {name: specs[name] for name in self.names}
        session.reserved = optimizer.state_bytes(self.shapes)
        exact = session.backend.exact
        graph = optimizer.graph(self.shapes, exact=exact, buckets=not exact)
        self.update = session.finish(graph)
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
        session = self.session
        num_items = sum(batch.trained_tokens for batch in batches)
        assert num_items > 0, "a step without a trained token"
        totals: dict[str, Array] | None = None
        losses = []
        taken = number if taken is None else taken
        if self.hessian is not None and self.hessian.due(taken):
            # Before the step's own gradients: a planned program's next run would write over them.
            key = (self.seed & MASK32, self.seed >> 32, number, 0)
            self.state.update(self.hessian.estimate(session, self.state, batches[0], key=key))
        for micro, batch in enumerate(batches):
            key = (self.seed & MASK32, self.seed >> 32, number, micro)
            loss, totals = session.micro(batch, self.names, num_items=num_items, totals=totals, dropout_key=key)
            losses.append(loss)
        assert totals is not None
        made = self.update(self._inputs(totals, taken, lr))
        for name in self.names:
            session.parameters[name] = made[name]
        self.state = {name: made[name] for name in self.state}
        return sum(self._float(loss) for loss in losses), self._float(made["grad_norm"])

    def _inputs(self, grads: Mapping[str, Array], number: int, lr: float) -> dict[str, Any]:
        backend = self.session.backend
        scalars = self.optimizer.scalars(self.shapes, lr=lr, step=number, seed=self.seed)
        return {
            **{name: self.session.parameters[name] for name in self.names},  # a master stands in for its own
            **{f"grad.{name}": array for name, array in grads.items()},
            **self.state,
            **{name: backend.scalar(value) for name, value in scalars.items()},
        }

    def _float(self, scalar: Array) -> float:
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

    def optimizer_state(self) -> dict[str, RawTensor]:
        return {name: self.session.backend.to_raw(array) for name, array in self.state.items()}

    def restore(self, weights: Mapping[str, RawTensor], state: Mapping[str, RawTensor]) -> None:
        """Takes over a checkpoint's tensors, whichever backend wrote them."""
        from_raw = self.session.backend.from_raw
        self.session.parameters.update({name: from_raw(weights[name]) for name in self.names})
        self.state = {name: from_raw(state[name]) for name in self.state}
