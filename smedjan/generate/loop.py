"""Prefill, then one token a step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from smedjan.checkpoint.dtype import to_float32
from smedjan.errors import ConfigError
from smedjan.generate.sampling import Sampling, choose
from smedjan.runtime.session import Cache, Session

CAPACITY_STEP = 128
"""Caches come in multiples of this, so that prompts of like length share their programs."""


def generate(
    session: Session,
    input_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
) -> Iterator[int]:
    """The new tokens one by one; a stop token is given too, and ends it."""
    seen = [int(token) for token in input_ids]
    context = session.config.max_position_embeddings
    if not seen:
        raise ConfigError("is empty", field="prompt", remedy="give at least one token")
    if len(seen) + max_new_tokens > context:
        raise ConfigError(
            f"{len(seen)} tokens of prompt and {max_new_tokens} new ones exceed the context of {context}",
            field="max_new_tokens",
            remedy="shorten either",
        )
    wanted = len(seen) + max_new_tokens
    cache = Cache(session, batch=1, capacity=-(-wanted // CAPACITY_STEP) * CAPACITY_STEP)
    fresh = list(seen)
    restart = session.config.restart_after
    with session.backend.holding(cache.held_bytes, remedy="a base of 4 bits needs less: smedjan export --to mlx"):
        for step in range(max_new_tokens):
            if restart is not None and cache.length <= restart < len(seen):
                cache, fresh = Cache(session, batch=1, capacity=cache.capacity), list(seen)
            raw = session.backend.to_raw(cache.feed(np.asarray([fresh]), last=True))
            logits = to_float32(raw).reshape(-1, raw.shape[-1])[-1]
            token = choose(logits, seen, sampling, step)
            seen.append(token)
            yield token
            if token in stop:
                return
            fresh = [token]
