"""Whether a run is well: a row a check, with its value, what healthy looks like and what a red flag means.

The thresholds are rules of thumb, and the page says so by showing the value beside them; none stops a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from statistics import fmean, median

from smedjan.report.model import Check, Header, RunReport, Step, Verdict
from smedjan.report.scale import byte_size, number, percent

SPIKE = 5.0
"""A gradient norm this many times the median of the steps before it."""

WINDOW = 50
"""Steps whose median a spike is compared with."""

FEW = 10
"""Steps before which a trend says nothing."""


def checks(run: RunReport) -> tuple[Check, ...]:
    """What the log and the header of a run tell; a check without its data is left out."""
    steps, header = run.steps, run.header
    if not steps:
        return ()
    made = [_loss(steps), _eval(run), _spikes(steps), _skipped(steps)]
    if header is not None:
        made += [_clipped(steps, header), _trained(header), _unstopped(header)]
    made.append(_speed(steps))
    if header is not None:
        made.append(_memory(steps, header))
    return tuple(check for check in made if check is not None)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last tenth."""
    span = max(1, len(values) // 10)
    return fmean(values[:span]), fmean(values[-span:])


def _loss(steps: Sequence[Step]) -> Check | None:
    losses = [step.loss for step in steps if isfinite(step.loss)]
    if not losses:
        return None
    first, last = _ends(losses)
    verdict: Verdict = "early" if len(losses) < FEW else "good"
    if verdict == "good" and last >= 0.98 * first:
        verdict = "bad" if last > 1.05 * first else "watch"
    return Check(
        name="Loss falls",
        value=f"{number(first)} to {number(last)} ({_change(first, last)})",
        verdict=verdict,
        healthy="Falls, fast at first and then slowly, with noise from step to step.",
        red_flag="Flat: a rate too low, or too few trained tokens. Rising: a rate too high, or a broken data set.",
    )


def _eval(run: RunReport) -> Check | None:
    """The last evaluation against the training loss of the steps before it, and against its own lowest."""
    evals = [point for point in run.evals if isfinite(point.loss)]
    if not evals:
        return None
    last, lowest = evals[-1], min(evals, key=lambda point: point.loss)
    near = [step.loss for step in run.steps if step.step <= last.step and isfinite(step.loss)]
    train = fmean(near[-max(1, len(near) // 10) :]) if near else None
    value = f"evaluation {number(last.loss)}"
    if train is not None:
        value += f", training {number(train)} (gap {number(last.loss - train)})"
    verdict: Verdict = "early" if len(evals) < 2 else "good"
    if last.loss > 1.02 * lowest.loss:
        verdict = "bad" if last.loss > 1.1 * lowest.loss else "watch"
        value += f"; lowest {number(lowest.loss)} at step {lowest.step:,}"
    return Check(
        name="Evaluation against training",
        value=value,
        verdict=verdict,
        healthy="Both fall; evaluation stays a little above training.",
        red_flag="Evaluation rises while training falls: the rows are learnt by heart. Take fewer epochs or an earlier "
        "checkpoint.",
    )


def _spikes(steps: Sequence[Step]) -> Check | None:
    norms = [(step.step, step.grad_norm) for step in steps if step.grad_norm is not None and isfinite(step.grad_norm)]
    if not norms:
        return None
    spikes = []
    for index, (step, norm) in enumerate(norms):
        before = [value for _, value in norms[max(0, index - WINDOW) : index]]
        if len(before) >= FEW and norm > SPIKE * median(before):
            spikes.append(step)
    values = [norm for _, norm in norms]
    value = f"median {number(median(values))}, highest {number(max(values))}"
    value += f"; {len(spikes)} steps above {SPIKE:g} times the median before them" if spikes else ""
    verdict: Verdict = "early" if len(norms) < FEW else "good"
    if spikes:
        verdict = "bad" if len(spikes) > 0.02 * len(norms) + 1 else "watch"
    return Check(
        name="Gradient norm",
        value=value,
        verdict=verdict,
        healthy="Settles after the warm-up and stays within a factor of a few.",
        red_flag="Spikes: odd rows, or a rate too high; the loss jumps after them. Near zero: nothing is learnt.",
    )


def _skipped(steps: Sequence[Step]) -> Check | None:
    counted = [step.skipped for step in steps if step.skipped is not None]
    broken = sum(not isfinite(step.loss) for step in steps)
    if not counted and not broken:
        return None
    skipped = max(counted, default=0)
    share = max(skipped, broken) / len(steps)
    return Check(
        name="Skipped steps",
        value=f"{skipped} of {len(steps):,}" + (f", {broken} with a loss that is not finite" if broken else ""),
        verdict="good" if share == 0 else "watch" if share <= 0.01 else "bad",
        healthy="None.",
        red_flag="Losses or gradients overflow: lower the rate, or look for odd rows.",
    )


def _clipped(steps: Sequence[Step], header: Header) -> Check | None:
    norms = [step.grad_norm for step in steps if step.grad_norm is not None]
    if not header.clip or not norms:
        return None
    share = sum(norm > header.clip for norm in norms) / len(norms)
    late = norms[len(norms) // 2 :]
    later = sum(norm > header.clip for norm in late) / len(late)
    return Check(
        name="Clipped steps",
        value=f"{percent(share)} at {header.clip:g}, of the second half {percent(later)}",
        verdict="early" if len(norms) < FEW else "good" if later <= 0.5 else "watch",
        healthy="Some at the beginning, few later.",
        red_flag="Nearly all: the clip, not the rate, decides how far a step goes. Lower the rate, or raise the clip.",
    )


def _trained(header: Header) -> Check:
    return Check(
        name="Trained tokens",
        value=f"{percent(header.trained_share)} of all that are read",
        verdict="good" if header.trained_share >= 0.05 else "watch",
        healthy="The answers' share of the rows: often 10 to 60 %.",
        red_flag="Next to nothing: long prompts and short answers, or a mask that covers too much. See smedjan data "
        "inspect.",
    )


def _unstopped(header: Header) -> Check:
    share = header.unstopped / max(1, header.kept)
    return Check(
        name="Rows that never stop",
        value=f"{header.unstopped:,} of {header.kept:,}",
        verdict="good" if header.unstopped == 0 else "watch" if share <= 0.1 else "bad",
        healthy="None, but for texts that are meant to go on.",
        red_flag="Their answers end without a trained stop token: the model learns to go on for ever.",
    )


def _speed(steps: Sequence[Step]) -> Check | None:
    speeds = [step.tokens_per_s for step in steps if step.tokens_per_s is not None]
    if not speeds:
        return None
    usual, now = median(speeds), median(speeds[-max(3, len(speeds) // 20) :])
    mfu = [step.mfu for step in steps if step.mfu is not None]
    value = f"now {number(now)}, median {number(usual)}"
    value += f"; {percent(median(mfu))} of the machine's peak" if mfu else ""
    verdict: Verdict = "early" if len(speeds) < FEW else "good"
    if verdict == "good" and now < 0.8 * usual:
        verdict = "bad" if now < 0.5 * usual else "watch"
    return Check(
        name="Tokens a second",
        value=value,
        verdict=verdict,
        healthy="Even, but for rows of other lengths.",
        red_flag="A lasting drop: another program, heat, or memory that is swapped out.",
    )


def _memory(steps: Sequence[Step], header: Header) -> Check | None:
    peaks = [step.peak_bytes for step in steps if step.peak_bytes is not None]
    if not peaks or header.planned_bytes is None:
        return None
    above = max(0, max(peaks) - header.baseline_bytes)
    share = above / header.planned_bytes
    # Below this, the libraries' own buffers are most of what is measured.
    small = header.planned_bytes < 500e6
    return Check(
        name="Memory against the plan",
        value=f"{byte_size(above)} above what was there before, {byte_size(header.planned_bytes)} planned",
        verdict="early" if small and share > 1.1 else "good" if share <= 1.1 else "watch" if share <= 1.3 else "bad",
        healthy="No more than planned, and flat after the first steps.",
        red_flag="Growing: something is kept from step to step. Far above the plan: please report it.",
    )


def _change(first: float, last: float) -> str:
    return f"{(last / first - 1) * 100:+.0f} %" if first > 0 else "from zero"
