"""Sophia's estimate of the Hessian's diagonal (Gauss-Newton-Bartlett; Liu et al. 2023, algorithm 2).

The labels of a micro-batch are drawn from the model's own distribution at each trained token; B g^2, of the gradient g
of the mean loss of these B tokens, has the diagonal of the Gauss-Newton matrix as its mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from smedjan.backends.base import Array
from smedjan.data.collate import Batch
from smedjan.optim.base import Parameters
from smedjan.optim.sophia import Sophia
from smedjan.runtime.session import Session

SITE = 0x50F1A
"""Of the draws: the last word of their Philox counter."""


class Hessian:
    """What estimates the diagonals that the optimizer's state holds as hessian.NAME."""

    def __init__(self, session: Session, optimizer: Sophia, parameters: Parameters) -> None:
        self.optimizer, self.names = optimizer, tuple(parameters)
        self.program = session.finish(optimizer.hessian_graph(parameters))

    def due(self, taken: int) -> bool:
        """Whether the `taken`th step begins with an estimate."""
        return self.optimizer.due(taken)

    def estimate(
        self, session: Session, state: Mapping[str, Array], batch: Batch, *, key: Sequence[int]
    ) -> dict[str, Array]:
        """The new hessian.NAME, by a pass more over `batch`. `key`: (seed low, seed high, step, micro-batch)."""
        logits = session.trained_logits(batch)
        labels = batch.labels.copy()
        labels.reshape(-1)[batch.loss_rows] = draw(logits, key)
        count = float(batch.trained_tokens)
        _, grads = session.micro(replace(batch, labels=labels), self.names, num_items=count, dropout_key=key)
        kept = {name: state[name] for name in (f"hessian.{name}" for name in self.names)}
        given = {f"grad.{name}": gradient for name, gradient in grads.items()}
        return self.program({**kept, **given, "count": session.backend.scalar(count)})


def draw(logits: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """A token of each row's softmax, int64 [R]: where the running sum of the probabilities passes a uniform number, of
    Philox4x64-10 (numpy's) under (seed, step, micro-batch)."""
    low, high, step, micro = key
    bits = np.random.Philox(key=low | high << 32, counter=[0, step, micro, SITE]).random_raw(len(logits))
    uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    shares = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True)).cumsum(-1)
    below = shares < uniform[:, None] * shares[:, -1:]
    return np.minimum(below.sum(-1), logits.shape[-1] - 1).astype(np.int64)
