"""One tokenised document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smedjan.data.files import Source


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """One document: `input_ids` int32 [T] and `labels_mask` bool [T], true where the token is trained."""

    input_ids: NDArray[np.int32]
    labels_mask: NDArray[np.bool_]
    source: Source
    truncated: bool = False

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.labels_mask.shape, "one mask element a token"

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """Predictions with a target. Nothing stands before the first token to predict it from, so it never counts."""
        return int(np.count_nonzero(self.labels_mask[1:]))
