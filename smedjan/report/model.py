"""What a report says, as plain data: `from_run` reads it off a run directory, `write_report` draws it.

Shares are between 0 and 1, an interval is (low, high) at 95 %, memory is in bytes, speed in tokens a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Interval95 = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step. `tokens` are those it read, `trained_tokens` those its loss counts."""

    step: int
    loss: float
    grad_norm: float | None = None
    lr: float | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    mfu: float | None = None
    eta_s: float | None = None
    skipped: int | None = None
    """Steps so far that changed nothing, since their gradient was not finite."""


@dataclass(frozen=True, kw_only=True)
class EvalPoint:
    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Header:
    """Of a run's header, what its health is judged by. `baseline_bytes` is the memory taken before the model."""

    total_steps: int
    clip: float
    kept: int
    unstopped: int
    trained_share: float
    planned_bytes: int | None
    baseline_bytes: int


@dataclass(frozen=True, kw_only=True)
class Words:
    """What the model made of a prompt at `step`, while it was trained."""

    step: int
    prompt: str
    text: str


Verdict = Literal["good", "watch", "bad", "early"]
"""`early`: too few steps to say, or too little to measure."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One sign of a run's health."""

    name: str
    value: str
    verdict: Verdict
    healthy: str
    red_flag: str


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Tokens a second of two programs that took turns: `rounds` holds (subject, baseline) of each round."""

    subject: str
    baseline: str
    what: str
    machine: str
    rounds: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The share of held-out items that one system answers exactly; `ours` marks the model of this run."""

    name: str
    share: float
    interval: Interval95 | None
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Our share less that of the best baseline, over the same items."""

    over: str
    estimate: float
    interval: Interval95


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out item, what it should be answered with and what it was."""

    prompt: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        return self.expected == self.answer


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One confusion, how often it happened, and an item that shows it."""

    expected: str
    answer: str
    count: int
    example: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    n: int
    scores: tuple[Score, ...] = ()
    difference: Difference | None = None
    nll: float | None = None
    perplexity: float | None = None
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """One comparison with `transformers`: equal to the bit, or `error` away with `bound` allowed."""

    name: str
    attention: str
    dtype: str
    mode: str
    batch: str
    padding: str
    equal: bool
    max_abs: float
    max_ulp: float | None
    error: float | None
    bound: float | None

    @property
    def verdict(self) -> str:
        if self.equal:
            return "equal to the bit"
        if self.bound is not None and self.error is not None and self.error <= self.bound:
            return "within bound"
        return "out of bound" if self.bound is not None else "differs"

    @property
    def held(self) -> bool:
        return self.verdict in ("equal to the bit", "within bound")


@dataclass(frozen=True, kw_only=True)
class Parity:
    cases: tuple[ParityCase, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Lowering:
    op: str
    count: int
    lowering: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    ops: tuple[Lowering, ...]
    nodes: int | None = None
    flops_per_token: float | None = None
    planned_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A section whose data is absent is left out of the page."""

    title: str
    subtitle: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    steps: tuple[Step, ...] = ()
    evals: tuple[EvalPoint, ...] = ()
    header: Header | None = None
    words: tuple[Words, ...] = ()
    bench: Bench | None = None
    evaluation: Evaluation | None = None
    parity: Parity | None = None
    plan: Plan | None = None
    notes: tuple[str, ...] = ()


def mistakes(samples: tuple[Sample, ...], limit: int = 8) -> tuple[Mistake, ...]:
    """The commonest confusions, most frequent first, each with the first item that shows it."""
    seen: dict[tuple[str, str], list[str]] = {}
    for sample in samples:
        if not sample.correct:
            seen.setdefault((sample.expected, sample.answer), []).append(sample.prompt)
    ordered = sorted(seen.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(
        Mistake(expected=expected, answer=answer, count=len(prompts), example=prompts[0])
        for (expected, answer), prompts in ordered[:limit]
    )
