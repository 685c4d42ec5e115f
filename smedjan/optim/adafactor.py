"""Adafactor: second moments of matrices as one number a row and one a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from smedjan.ops.elementwise import cast
from smedjan.ops.steps import adafactor_update
from smedjan.optim.base import Optimizer, Parameters, Shape, Update, lr_input


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Shazeer & Stern 2018, "Adaptive Learning Rates with Sublinear Memory Cost", as transformers' Adafactor with
    scale_parameter and relative_step off: the rate is the run's. No first moment; beta2 is 1 - t^decay_rate, where t
    counts the steps that were taken; the root mean square of a step is at most lr times `threshold`.

    State is float32 always, as there: of a matrix [M, N] it is M + N numbers.
    """

    states: ClassVar[tuple[str, ...]] = ("same", "float32")

    decay_rate: float = -0.8
    threshold: float = 1.0

    def kept(self, name: str, shape: Shape, dtype: str) -> dict[str, tuple[Shape, str]]:
        if len(shape) < 2:
            return {"exp_avg_sq": (shape, "float32")}
        rows, cols = shape[:-1], (*shape[:-2], shape[-1])
        return {"exp_avg_sq_row": (rows, "float32"), "exp_avg_sq_col": (cols, "float32")}

    def scalars(self, parameters: Parameters, *, lr: float, step: int, seed: int) -> dict[str, float]:
        return {**super().scalars(parameters, lr=lr, step=step, seed=seed), "beta2t": 1.0 - step**self.decay_rate}

    def update(self, update: Update, names: Sequence[str]) -> None:
        for name in names:
            shape, dtype = update.parameters[name]
            kinds = list(self.kept(name, shape, dtype))
            moments = [update.state[f"{kind}.{name}"] for kind in kinds]
            gradient, coefficient = self.gradient(update, name)
            param, *made = adafactor_update(
                cast(self.parameter(update, name), "float32"),
                cast(gradient, "float32"),
                *(moments if len(moments) == 2 else (*moments, None)),
                update.scalars[lr_input(self.rate(name))],
                update.scalars["beta2t"],
                update.norm,
                None if coefficient is None else cast(coefficient, "float32"),
                threshold=self.threshold,
                weight_decay=self.weight_decay,
            )
            self.write(update, name, param)
            for kind, new in zip(kinds, made, strict=True):
                update.graph.output(f"{kind}.{name}", new)
