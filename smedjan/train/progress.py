"""What a run has come to besides its weights and its optimizer's state, kept in a checkpoint's state.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from smedjan.errors import ConfigError
from smedjan.train.config import TrainConfig


@dataclass
class Progress:
    """
    skipped         steps whose gradient norm was not finite: they changed neither weights nor state
    in_a_row        how many of the last ones were
    best_step       after which the evaluation's loss was the lowest so far
    best_eval_loss  that loss
    waited          evaluations since then
    stopped_early   the run is over: `patience` of them
    """

    skipped: int = 0
    in_a_row: int = 0
    best_step: int | None = None
    best_eval_loss: float | None = None
    waited: int = 0
    stopped_early: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """What a checkpoint's state has of it; one of an older version has none."""
        return cls(**state.get("progress", {}))

    def to_state(self) -> dict[str, Any]:
        return asdict(self)

    def after_step(self, step: int, loss: float, norm: float, *, max_skipped: int, last: bool) -> None:
        """Counts a step that was skipped. An error are too many in a row, two in a row with which the run would end
        (weights that overflow may give finite losses still), and a loss that is not finite and that no norm warned of,
        or that is the last one: a result of such weights is worth nothing."""
        self.in_a_row = 0 if math.isfinite(norm) else self.in_a_row + 1
        self.skipped += not math.isfinite(norm)
        if self.in_a_row >= (min(2, max_skipped) if last else max_skipped):
            raise ConfigError(
                f"{self.in_a_row} steps in a row had a gradient norm that is not finite, the last one step {step} "
                f"(loss {loss:g}, norm {norm:g})",
                field="optim.lr",
                remedy="lower --optim.lr; the last checkpoint is whole",
            )
        if not math.isfinite(loss) and (last or math.isfinite(norm)):
            raise ConfigError(
                f"loss {loss:g}, gradient norm {norm:g} at step {step}",
                field="optim.lr",
                remedy="lower --optim.lr; the last checkpoint is whole",
            )

    def after_evaluation(self, step: int, loss: float, train: TrainConfig) -> bool:
        """Whether to keep these weights: the loss is the lowest so far, by more than `min_delta`, and somebody has
        patience. One that is not finite never is."""
        best = self.best_eval_loss
        better = math.isfinite(loss) and (best is None or loss < best - train.min_delta)
        if better:
            self.best_step, self.best_eval_loss, self.waited = step, loss, 0
        else:
            self.waited += 1
        self.stopped_early = train.patience is not None and self.waited >= train.patience
        return better and train.patience is not None

    def best(self) -> dict[str, Any]:
        """What a run shows of it."""
        return {key: getattr(self, key) for key in ("best_step", "best_eval_loss", "stopped_early")}
