"""Many sequences decoded together: prompts padded on the left, so that all write the same place of the cache.

B rows, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from smedjan.checkpoint.dtype import to_float32
from smedjan.errors import ConfigError
from smedjan.generate.loop import CAPACITY_STEP, generate
from smedjan.generate.sampling import Sampling, choose
from smedjan.runtime.session import Cache, Session

LOGITS = 1 << 25
"""Logits that are on the host at once (128 MiB): a longer batch is made of fewer rows."""

Ended = Callable[[int, int], bool]
"""Called with (row, its new token): whether that token ends the row."""


def grouped(lengths: Sequence[int], *, batch_size: int, tokens: int) -> list[list[int]]:
    """Indices in groups of at most `batch_size` rows and, padded to the longest, `tokens` tokens; one row at least.

    The longest come first: rows of like length share a group, and what memory does not hold fails at once.
    """
    assert batch_size >= 1, batch_size
    groups: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if room < 1:
            groups.append([])
            room = max(1, min(batch_size, tokens // max(1, lengths[index])))
        groups[-1].append(index)
        room -= 1
    return groups


def generate_many(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    stop: Collection[int] = (),
    sampling: Sequence[Sampling] | Sampling = Sampling(),  # noqa: B008  (frozen)
    batch_size: int = 32,
    ended: Ended | None = None,
    on_row: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt: those of `generate` on it alone, up to rounding. `on_row`: (rows done, all)."""
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    # The head of an exact backend makes the logits of whole prompts, a fast one's those of their last tokens.
    tokens = LOGITS // session.config.vocab_size if session.backend.exact else LOGITS
    made: list[list[int]] = [[] for _ in prompts]
    done = 0
    for group in grouped([len(prompt) for prompt in prompts], batch_size=batch_size, tokens=tokens):

        def over(row: int, token: int, group: list[int] = group) -> bool:
            return ended is not None and ended(group[row], token)

        found = generate_batch(
            session,
            [prompts[index] for index in group],
            max_new_tokens=[max_new_tokens[index] for index in group],
            stop=stop,
            sampling=[each[index] for index in group],
            ended=over,
        )
        for index, tokens_made in zip(group, found, strict=True):
            made[index] = tokens_made
        done += len(group)
        if on_row is not None:
            on_row(done, len(prompts))
    return made


def generate_batch(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    stop: Collection[int],
    sampling: Sequence[Sampling],
    ended: Ended,
) -> list[list[int]]:
    """One batch, until all of its rows have ended; a stop token is the last of its row."""
    config, rows = session.config, len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts])
    wanted = lengths + np.asarray(max_new_tokens)
    for length, new in zip(lengths, max_new_tokens, strict=True):
        if not length or length + new > config.max_position_embeddings:
            raise ConfigError(
                f"{length} tokens of prompt and {new} new ones, for a context of {config.max_position_embeddings}",
                field="prompt",
                remedy="give at least one token, and no more than fit",
            )
    if rows == 1 or (config.restart_after is not None and wanted.max() > config.restart_after):
        # Rows would change their rope's frequencies at different steps, and all of a batch have the same.
        alone = zip(prompts, max_new_tokens, sampling, strict=True)
        return [
            _alone(session, prompt, new, stop, knobs, lambda token, row=row: ended(row, token))  # type: ignore[misc]
            for row, (prompt, new, knobs) in enumerate(alone)
        ]
    width, steps = int(lengths.max()), int(max(max_new_tokens))
    ids = np.zeros((rows, width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    pad = width - lengths
    mask = np.arange(width + steps) >= pad[:, None]
    cache = Cache(session, batch=rows, capacity=-(-(width + steps) // CAPACITY_STEP) * CAPACITY_STEP)
    made: list[list[int]] = [[] for _ in prompts]
    live = [new > 0 for new in max_new_tokens]
    for step in range(steps):
        end = cache.length + ids.shape[1]
        # A row that is done goes on beside the others; its places end where the context does.
        places = np.arange(cache.length, end) - pad[:, None]
        places = places.clip(0, config.max_position_embeddings - 1)
        raw = session.backend.to_raw(cache.feed(ids, mask[:, :end], places, last=True))
        logits = to_float32(raw).reshape(rows, -1, raw.shape[-1])[:, -1]
        ids = np.zeros((rows, 1), dtype=np.int64)
        for row in np.flatnonzero(live).tolist():
            token = choose(logits[row], [*prompts[row], *made[row]], sampling[row], step)
            made[row].append(token)
            ids[row] = token
            over = token in stop or len(made[row]) == max_new_tokens[row]
            live[row] = not (ended(row, token) or over)
        if not any(live):
            break
    return made


def _alone(
    session: Session,
    prompt: Sequence[int],
    new: int,
    stop: Collection[int],
    sampling: Sampling,
    ended: Callable[[int], bool],
) -> list[int]:
    made = []
    for token in generate(session, prompt, max_new_tokens=new, stop=stop, sampling=sampling):
        made.append(token)
        if ended(token):
            break
    return made
