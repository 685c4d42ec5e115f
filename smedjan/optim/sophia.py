"""Sophia: momentum over a diagonal of the Hessian that is estimated every few steps, each value's step clipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from smedjan.graph.node import Graph
from smedjan.ops.elementwise import cast
from smedjan.ops.optimizer import global_norm
from smedjan.ops.steps import hessian_update, sophia_update
from smedjan.optim.base import Optimizer, Parameters, Shape, Update, lr_input


@dataclass(frozen=True, kw_only=True)
class Sophia(Optimizer):
    """Sophia-G of Liu et al. 2023, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training", algorithm 3, with the names of the authors' code: betas 0.965 and 0.99, rho for the paper's gamma.

    Every `every` steps, from the first one on, `hessian_graph` takes up the gradient of a loss over the step's first
    micro-batch with labels drawn from the model's own distribution. Until then, and between, h stays. It is as wide as
    what is updated, or float32: a small h is a long step, and eight bits have no small numbers beside large ones.
    """

    states: ClassVar[tuple[str, ...]] = ("same", "float32")

    beta1: float = 0.965
    beta2: float = 0.99
    rho: float = 0.04
    every: int = 10

    def kept(self, name: str, shape: Shape, dtype: str) -> dict[str, tuple[Shape, str]]:
        return self.moments(shape, dtype, ("exp_avg", "hessian"))

    def update(self, update: Update, names: Sequence[str]) -> None:
        for name in names:
            hessian, param = update.state[f"hessian.{name}"], self.parameter(update, name)
            chance = self.by_chance(update.parameters[name][1])
            work = "float32" if chance or hessian.dtype != param.dtype else param.dtype
            gradient, coefficient = self.gradient(update, name)
            moved, exp_avg = sophia_update(
                cast(param, work),
                cast(gradient, work),
                cast(update.state[f"exp_avg.{name}"], work),
                cast(hessian, work),
                update.scalars[lr_input(self.rate(name))],
                update.norm,
                coefficient,
                beta1=self.beta1,
                rho=self.rho,
                weight_decay=self.weight_decay,
            )
            self.write(update, name, moved)
            update.graph.output(f"exp_avg.{name}", cast(exp_avg, hessian.dtype))
            update.graph.output(f"hessian.{name}", hessian)

    def due(self, taken: int) -> bool:
        """Whether the diagonal is estimated before the `taken`th step, counted from 1."""
        return (taken - 1) % self.every == 0

    def hessian_graph(self, parameters: Parameters) -> Graph:
        """Inputs hessian.NAME, grad.NAME and count, the tokens of the mean; the hessians back."""
        graph = Graph()
        count = graph.input("count", (), "float32")
        grads = {name: graph.input(f"grad.{name}", shape, dtype) for name, (shape, dtype) in parameters.items()}
        norm = global_norm(*grads.values())
        for name, (shape, dtype) in parameters.items():
            old = graph.input(f"hessian.{name}", *self.kept(name, shape, dtype)["hessian"])
            graph.output(f"hessian.{name}", hessian_update(old, grads[name], count, norm, beta2=self.beta2))
        return graph
