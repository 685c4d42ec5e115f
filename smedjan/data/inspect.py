"""What a run would train on: rows as tokens, which of them are trained, how many and how long, and what is refused.

Refused, since a model trained on it does not do what its owner wants, and nothing else would say so:

    a row without a token to train on                    it only costs time
    BOS twice                                            generation sends one
    no kept row trains a stop token                      the model would never stop
    a prompt that generation would render otherwise      the model would be asked what it was not taught
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np

from smedjan.data.formats import Broken, Row
from smedjan.data.mask import (
    Counts,
    Example,
    LossOn,
    Tokenizer,
    TooLong,
    check_served,
    fit,
    stops,
    tokenize_row,
)
from smedjan.errors import DataError

REPLACED = "\N{REPLACEMENT CHARACTER}"


class Decoder(Tokenizer, Protocol):
    """A tokenizer that decodes too."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens that make whole characters together, nearly always one, and whether they are trained."""

    ids: tuple[int, ...]
    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row as it is trained on: where it was read, and its tokens."""

    source: str
    truncated: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of the kept rows, in tokens."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """`trained_tokens` are predictions with a target, `trained_share` is their part of all tokens. `longest`: the
    longest row before any was cut or dropped."""

    counts: Counts
    tokens: int
    trained_tokens: int
    longest: int
    lengths: Lengths
    samples: tuple[Sample, ...]
    converted: dict[str, str] | None = None
    """What the rows were converted from and to, if they were."""

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens


def inspect_rows(
    rows: Iterable[Row],
    tokenizer: Decoder,
    *,
    max_length: int,
    loss_on: LossOn = "completion",
    too_long: TooLong = "error",
    broken: Broken | None = None,
    samples: int = 3,
    now: datetime | None = None,
) -> Inspection:
    """What `tokenize_rows` would keep of these rows. Raises DataError for what is refused, naming the row.

    broken   what becomes of rows that cannot be masked: the one with which the rows are read
    """
    broken = broken or Broken()
    shown: list[Example] = []
    sizes: list[int] = []
    row, longest, trained, truncated, dropped, unstopped = None, 0, 0, 0, 0, 0
    for row in rows:
        try:
            whole = tokenize_row(row, tokenizer, loss_on=loss_on, now=now)
        except DataError as error:
            broken(error)
            continue
        check_served(row, tokenizer, now=now)
        longest = max(longest, len(whole))
        example = fit(whole, max_length=max_length, too_long=too_long)
        if example is None:
            dropped += 1
            continue
        sizes.append(len(example))
        trained += example.trained_tokens
        truncated += example.truncated
        unstopped += not example.truncated and not stops(example, tokenizer)
        if len(shown) < samples:
            shown.append(example)
    assert row is not None, "stream_rows never gives no rows"
    if not sizes and not dropped:
        broken.none_left(row.file)
    if not sizes:
        others = f", but for {broken.count} broken ones," if broken.count else ""
        raise DataError(
            f"no row is left: all {dropped}{others} are longer than {max_length} tokens",
            file=row.file,
            remedy="raise --max-length, or use shorter rows",
        )
    if unstopped == len(sizes) - truncated:
        raise DataError(
            "no row trains a stop token: a model trained on them would never stop",
            file=row.file,
            remedy="check eos_token_id in generation_config.json against what the chat template writes, or the length",
        )
    lengths = np.sort(np.array(sizes))
    return Inspection(
        counts=Counts(kept=len(sizes), truncated=truncated, dropped=dropped, broken=broken.count, unstopped=unstopped),
        converted=row.converted,
        tokens=int(lengths.sum()),
        trained_tokens=trained,
        longest=longest,
        lengths=Lengths(
            min=int(lengths[0]),
            median=int(lengths[(len(lengths) - 1) // 2]),
            p95=int(lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]),
            max=int(lengths[-1]),
        ),
        samples=tuple(
            Sample(
                source=str(example.source), truncated=example.truncated, pieces=tuple(pieces(example, tokenizer.decode))
            )
            for example in shown
        ),
    )


def pieces(example: Example, decode: Callable[..., str]) -> Iterator[Piece]:
    """The row's tokens and their text: together they are the decoded row. Tokens that hold parts of one character come
    together, and are trained if one of them is."""
    ids, trained = example.input_ids.tolist(), example.labels_mask.tolist()
    start = 0
    for end in range(1, len(ids) + 1):
        # A window of its own: decoding the whole text up to here, for every token, takes time by the square.
        before = decode(ids[max(0, start - 4) : start], skip_special_tokens=False)
        text = decode(ids[max(0, start - 4) : end], skip_special_tokens=False)
        if text.endswith(REPLACED) and end < len(ids) and end - start < 4:
            continue
        yield Piece(ids=tuple(ids[start:end]), text=text[len(before) :], trained=any(trained[start:end]))
        start = end
