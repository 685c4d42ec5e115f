"""Numbers to pixels, round tick values, and the way figures are written in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10


@dataclass(frozen=True, kw_only=True)
class Scale:
    """[low, high] onto pixels [start, stop], linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __post_init__(self) -> None:
        assert self.low < self.high, (self.low, self.high)
        assert not self.log or self.low > 0, "a logarithm of nothing"

    def __call__(self, value: float) -> float:
        low, high = (log10(self.low), log10(self.high)) if self.log else (self.low, self.high)
        at = log10(max(value, self.low)) if self.log else value
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Some `about` round values of the range: multiples of 1, 2 or 5, or powers of ten and parts of them."""
        if not self.log:
            step = _round_step((self.high - self.low) / about)
            first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
            return [i * step for i in range(first, last + 1)]
        powers = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            ticks = [f * 10.0**i for i in powers for f in factors if self.low <= f * 10.0**i <= self.high]
            if len(ticks) <= about:
                return ticks
        return ticks[:: ceil(len(ticks) / about)]


def over(values: Sequence[float], start: float, stop: float, *, zero: bool = False, log: bool = False) -> Scale:
    """A scale that holds all finite `values` with a little air; `zero` makes it start at 0."""
    finite = [value for value in values if isfinite(value) and (value > 0 or not log)]
    if not finite:
        finite = [1.0]
    low, high = min(finite), max(finite)
    if log:
        return Scale(low=low / 1.2, high=high * 1.2, start=start, stop=stop, log=True)
    if zero:
        low = min(low, 0.0)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(low=low if zero else low - pad, high=high + pad, start=start, stop=stop)


def wants_log(values: Sequence[float]) -> bool:
    """Whether a curve spans so much that a linear axis would flatten its end: more than a factor of 30."""
    finite = [value for value in values if isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 30


def _round_step(rough: float) -> float:
    power = 10.0 ** floor(log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def number(value: float) -> str:
    """Four significant digits, no exponent between 1e-4 and 1e6: 0.0613, 276.1, 1,204."""
    if not isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    digits = max(0, 3 - floor(log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    return f"{share * 100:.1f} %"


def byte_size(count: float) -> str:
    """Decimal units, as disks and torch's counters are read: 2.1 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """As a person says it: 45 s, 12 min, 3 h 5 min, 2 d 4 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 60:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"
