"""Whether a run fits into the memory that there is: the longest row that would, the cheapest change that would help.

All by planning: no weight is read. On a backend that recomputes for want of memory, what fits is what fits then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smedjan.checkpoint.sizes import format_size
from smedjan.errors import BackendError, ConfigError
from smedjan.train.config import FinetuneConfig
from smedjan.train.evaluation import PAD_TO
from smedjan.train.largest import largest_form
from smedjan.train.outline import planned_bytes

if TYPE_CHECKING:
    from smedjan.train.parts import Finetune

GUESSES = 6
"""Interpolations before a search bisects: bytes are nearly a line over a row's length, or a parabola."""

Need = Callable[["Finetune", int | None], int]
"""(run, tokens of a row or None) -> bytes: `planned`, unless a test says otherwise."""

Flags = Mapping[str, Any]
"""{flag as it is typed, without dashes: value}"""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Flags to give besides the run's own, and what is planned with them."""

    flags: Flags
    planned_bytes: int

    def __str__(self) -> str:
        given = " ".join(f"--{name} {value}" for name, value in self.flags.items())
        return f"{given}: planned {format_size(self.planned_bytes)}"


def memory_available(parts: Finetune) -> int | None:
    """What the flags give the run, else what its device has left; None where that is unknown."""
    return parts.backend.memory_available() if parts.memory is None else parts.memory


def warning(planned: int, available: int | None) -> str | None:
    """One line for who starts a run that does not fit."""
    if available is None or planned <= available:
        return None
    return (
        f"planned {format_size(planned)}, {format_size(available)} available: the run may be killed; "
        "--dry-run says what would fit"
    )


def planned(parts: Finetune, seq: int | None = None) -> int:
    """Bytes of the largest micro-batch, or of one whose rows have `seq` tokens."""
    outline = parts.outline
    form = largest_form(parts, outline.session.dtype, seq)
    program = outline.smallest(form, accumulate=parts.config.train.grad_accum > 1)
    return planned_bytes(outline, program, forms=parts.forms)


def longest_row(parts: Finetune, available: int, need: Need = planned) -> int:
    """The most tokens of a row with which the run fits, a multiple of 16 or the model's context; 0 where none does."""
    context = parts.files.config.max_position_embeddings
    low, high = 0, -(-context // PAD_TO)

    def bytes_of(blocks: int) -> int:
        return need(parts, min(blocks * PAD_TO, context))

    at_high = bytes_of(high)
    if at_high <= available:
        return context
    at_low = bytes_of(1)
    if at_low > available:
        return 0
    low, turn = 1, 0
    while high - low > 1:
        middle = (low + high) // 2
        if turn < GUESSES and at_high > at_low:
            middle = low + (available - at_low) * (high - low) // (at_high - at_low)
            middle = min(max(middle, low + 1), high - 1)
        found = bytes_of(middle)
        if found <= available:
            low, at_low = middle, found
        else:
            high, at_high = middle, found
        turn += 1
    return low * PAD_TO


def advice(parts: Finetune, available: int, need: Need = planned) -> Advice | None:
    """What costs least of what makes the run fit; None where nothing does.

    In this order: smaller micro-batches, more of them, which give the same numbers; kept values made twice, which
    give the same bits; 8-bit optimizer state; a quantised base; adapters in place of full fine-tuning; shorter rows.
    Each with as large a micro-batch as fits.
    """
    for flags in _changes(parts, available):
        found = _largest_batch(parts, flags, available, need)
        if found is not None:
            return found
    return _shorter(parts, available, need)


def _changes(parts: Finetune, available: int) -> Iterator[Flags]:
    config = parts.config
    yield {}
    if parts.backend.recomputes and parts.memory is None:
        yield {"train.memory": f"{available // 1_000_000}MB"}
    if config.method == "full":
        if config.optim.state != "8bit":
            yield {"optim.state": "8bit"}
        yield {"method": "lora"}
    if config.method in ("full", "lora"):
        yield {"method": "qlora", "lora.bits": 8}
    if config.method != "qlora" or config.lora.bits == 8:
        yield {"method": "qlora", "lora.bits": 4}


def _largest_batch(parts: Finetune, flags: Flags, available: int, need: Need) -> Advice | None:
    """The flags with the largest micro-batch that fits, of the same number of rows a step."""
    batch = parts.config.train.batch_size
    sizes = [size for size in range(1, batch + 1) if batch % size == 0 and (flags or size < batch)]
    best = None
    for size in sizes[:1] + sizes[:0:-1]:  # the smallest first: where that does not fit, none does
        changed = _changed(parts, {**flags, **_batch(parts.config, size)})
        if changed is None or (found := need(changed, None)) > available:
            if best is None:
                return None
            continue
        best = Advice(flags={**flags, **_batch(parts.config, size)}, planned_bytes=found)
        if size > sizes[0]:
            break
    return best


def _shorter(parts: Finetune, available: int, need: Need) -> Advice | None:
    """Rows of one at a time, cut to what fits."""
    flags = _batch(parts.config, 1)
    one = _changed(parts, flags)
    assert one is not None, "a smaller micro-batch is no other run"
    length = min(longest_row(one, available, need), parts.max_length)
    if length == 0:
        return None
    flags["train.max-length"] = length
    if parts.config.train.too_long == "error":
        flags["train.too-long"] = "truncate"
    cut = _changed(parts, flags)
    assert cut is not None, "a shorter row is no other run"
    found = need(cut, None)
    return Advice(flags=flags, planned_bytes=found) if found <= available else None


def _batch(config: FinetuneConfig, size: int) -> dict[str, Any]:
    """The flags of micro-batches of `size` rows, as many as the step needs; none where they have so many already."""
    batch, accumulated = config.train.batch_size, config.train.grad_accum
    if size == batch:
        return {}
    return {"train.batch-size": size, "train.grad-accum": accumulated * (batch // size)}


def _changed(parts: Finetune, flags: Flags) -> Finetune | None:
    """None where the run's other flags do not go with these, or the backend has no kernels for them."""
    try:
        changed = parts.changed(with_flags(parts.config, flags))
        _ = changed.outline.update
    except (ConfigError, BackendError):
        return None
    return changed


def with_flags(config: FinetuneConfig, flags: Flags) -> FinetuneConfig:
    """The config with these flags in the place of its own."""
    values = config.to_dict()
    for name, value in flags.items():
        section, _, key = name.replace("-", "_").rpartition(".")
        (values[section] if section else values)[key] = value
    return FinetuneConfig.from_toml(None, values)
