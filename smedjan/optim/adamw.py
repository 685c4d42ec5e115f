"""AdamW's step as one graph: global norm, clip, update of every parameter, on the device from end to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smedjan.graph.node import Graph
from smedjan.ops.elementwise import scale_by
from smedjan.ops.optimizer import adamw_update, clip_coefficient, global_norm


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Loshchilov & Hutter 2019, with torch.optim.AdamW's meaning of each number; `clip` is a global norm, 0: none."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0

    state = ("exp_avg", "exp_avg_sq")

    def graph(self, parameters: Mapping[str, tuple[tuple[int, ...], str]], *, exact: bool) -> Graph:
        """Inputs NAME, grad.NAME, exp_avg.NAME, exp_avg_sq.NAME, lr, step; the same back, and the unclipped grad_norm.

        An exact backend multiplies each gradient by the coefficient first, as clip_grad_norm_ does; a fast one folds
        the coefficient into the update.
        """
        graph = Graph()
        lr, step = graph.input("lr", (), "float32"), graph.input("step", (), "int64")
        grads = {name: graph.input(f"grad.{name}", shape, dtype) for name, (shape, dtype) in parameters.items()}
        norm = global_norm(*grads.values())
        graph.output("grad_norm", norm)
        coefficient = clip_coefficient(norm, max_norm=self.clip) if self.clip > 0 else None
        for name, (shape, dtype) in parameters.items():
            moments = [graph.input(f"{kind}.{name}", shape, dtype) for kind in self.state]
            gradient, folded = grads[name], coefficient
            if exact and coefficient is not None:
                gradient, folded = scale_by(gradient, coefficient), None
            new = adamw_update(
                graph.input(name, shape, dtype),
                gradient,
                *moments,
                lr,
                step,
                folded,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=self.weight_decay,
            )
            for key, tensor in zip((name, *(f"{kind}.{name}" for kind in self.state)), new, strict=True):
                graph.output(key, tensor)
        return graph
