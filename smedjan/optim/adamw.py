"""AdamW's step as one graph: global norm, clip, update of every parameter, on the device from end to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smedjan.graph.node import Graph
from smedjan.graph.tensor import Tensor
from smedjan.ops.elementwise import cast, scale_by
from smedjan.ops.optimizer import adamw_update, clip_coefficient, global_norm

Parameters = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each trained parameter."""


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Loshchilov & Hutter 2019, with torch.optim.AdamW's meaning of each number; `clip` is a global norm, 0: none.

    With `master`, a parameter narrower than float32 has a float32 copy that is updated in its place and rounded to it:
    a step smaller than the parameter's own rounding is not lost. Moments have the dtype of what is updated.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    master: bool = False

    def has_master(self, dtype: str) -> bool:
        return self.master and dtype in ("bfloat16", "float16")

    def state(self, parameters: Parameters) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array that the optimizer keeps: exp_avg.NAME, exp_avg_sq.NAME and master.NAME."""
        made: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, (shape, dtype) in parameters.items():
            updated = "float32" if self.has_master(dtype) else dtype
            made[f"exp_avg.{name}"] = made[f"exp_avg_sq.{name}"] = (shape, updated)
            if self.has_master(dtype):
                made[f"master.{name}"] = (shape, updated)
        return made

    def graph(self, parameters: Parameters, *, exact: bool) -> Graph:
        """Inputs NAME, grad.NAME, the state, lr and step; the same back, and the unclipped grad_norm.

        An exact backend multiplies each gradient by the coefficient first, as clip_grad_norm_ does; a fast one folds
        the coefficient into the update.
        """
        graph = Graph()
        lr, step = graph.input("lr", (), "float32"), graph.input("step", (), "int64")
        state = {name: graph.input(name, shape, dtype) for name, (shape, dtype) in self.state(parameters).items()}
        grads = {name: graph.input(f"grad.{name}", shape, dtype) for name, (shape, dtype) in parameters.items()}
        norm = global_norm(*grads.values())
        graph.output("grad_norm", norm)
        coefficient = clip_coefficient(norm, max_norm=self.clip) if self.clip > 0 else None
        for name, (shape, dtype) in parameters.items():
            held = state[f"master.{name}"] if self.has_master(dtype) else graph.input(name, shape, dtype)
            new, *moments = self._update(held, grads[name], state, name, coefficient, lr, step, exact=exact)
            if self.has_master(dtype):
                graph.output(f"master.{name}", new)
            graph.output(name, cast(new, dtype))
            for kind, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                graph.output(f"{kind}.{name}", moment)
        return graph

    def _update(
        self,
        held: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        name: str,
        coefficient: Tensor | None,
        lr: Tensor,
        step: Tensor,
        *,
        exact: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = cast(gradient, held.dtype)
        folded = coefficient = None if coefficient is None else cast(coefficient, held.dtype)
        if exact and coefficient is not None:
            gradient, folded = scale_by(gradient, coefficient), None
        return adamw_update(
            held,
            gradient,
            state[f"exp_avg.{name}"],
            state[f"exp_avg_sq.{name}"],
            lr,
            step,
            folded,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
