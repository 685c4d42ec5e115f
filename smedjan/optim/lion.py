"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smedjan.ops.steps import lion_update
from smedjan.optim.base import Optimizer, Shape, Update


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2. Every value moves by lr, so that
    lr is a third to a tenth of AdamW's and the decay as many times its own (their section 5). Its one moment may be
    narrow: in 8 bits it is bitsandbytes' Lion8bit but for the blocks' begin."""

    beta1: float = 0.9
    beta2: float = 0.99

    def kept(self, name: str, shape: Shape, dtype: str) -> dict[str, tuple[Shape, str]]:
        return self.moments(shape, dtype, ("exp_avg",))

    def update(self, update: Update, names: Sequence[str]) -> None:
        attrs = {"beta1": self.beta1, "beta2": self.beta2, "weight_decay": self.weight_decay}
        for name in names:
            self.stepped(update, name, lion_update, {"exp_avg": True}, **attrs)
