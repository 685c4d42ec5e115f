"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import sqrt

from smedjan.ops.steps import muon_update
from smedjan.optim.adamw import AdamW
from smedjan.optim.base import Optimizer, Parameters, Shape, Update, named

ADJUSTMENTS = ("original", "match_rms_adamw")


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with torch.optim.Muon's meaning of
    each number: momentum orthogonalised, so that a step has singular values near 1, whatever the gradient's are.

    It is for the matrices of hidden layers. `apart` names the modules whose matrices are none (embeddings, the head):
    they, and all that is no matrix (norms, biases), take AdamW, whose learning rate is `adamw_rate` of Muon's. Both
    matrices of an adapter are matrices of a hidden layer: each is orthogonalised by itself, as it would be by
    torch.optim.Muon over an adapter's parameters, and B A has no say in it.

    adjust  what the rate of an [M, N] matrix is multiplied by:
      original         sqrt(max(1, M / N)), Jordan's
      match_rms_adamw  0.2 sqrt(max(M, N)), with which a step is as large as AdamW's, and AdamW's rate and decay serve
                       (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2)

    Momentum may be narrower than what is updated; rounded to nearest it moves by 1 - momentum, a twentieth, a step.
    """

    momentum: float = 0.95
    adjust: str = "match_rms_adamw"
    adamw_rate: float = 1.0
    apart: tuple[str, ...] = ()
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.adjust in ADJUSTMENTS, self.adjust

    @cached_property
    def others(self) -> AdamW:
        """What updates the parameters that Muon is not for."""
        given = {each.name: getattr(self, each.name) for each in fields(AdamW)}
        return AdamW(**{**given, "factor": self.factor * self.adamw_rate})

    def is_matrix(self, name: str, shape: Shape) -> bool:
        return len(shape) == 2 and not any(named(name, part) for part in self.apart)

    def _parted(self, parameters: Parameters) -> tuple[Parameters, Parameters]:
        """Muon's parameters, and AdamW's."""
        ours = {name: spec for name, spec in parameters.items() if self.is_matrix(name, spec[0])}
        return ours, {name: spec for name, spec in parameters.items() if name not in ours}

    def ratio(self, shape: Shape) -> float:
        """What the rate of a matrix is multiplied by."""
        rows, cols = shape
        return sqrt(max(1, rows / cols)) if self.adjust == "original" else 0.2 * sqrt(max(rows, cols))

    def kept(self, name: str, shape: Shape, dtype: str) -> dict[str, tuple[Shape, str]]:
        if self.is_matrix(name, shape):
            return self.moments(shape, dtype, ("momentum_buffer",))
        return self.others.kept(name, shape, dtype)

    def learning_rates(self, lr: float, parameters: Parameters) -> dict[str, float]:
        ours, rest = self._parted(parameters)
        return super().learning_rates(lr, ours) | self.others.learning_rates(lr, rest)

    def seeded(self, parameters: Parameters) -> bool:
        return super().seeded(parameters) or self.others.seeded(self._parted(parameters)[1])

    def update(self, update: Update, names: Sequence[str]) -> None:
        ours, rest = self._parted(update.parameters)
        for name, (shape, _) in ours.items():
            attrs = {"momentum": self.momentum, "ratio": self.ratio(shape), "weight_decay": self.weight_decay}
            self.stepped(update, name, muon_update, {"momentum_buffer": True}, **attrs)
        self.others.update(update, list(rest))
