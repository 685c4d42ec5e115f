"""The sections of the page. Each says its finding in a sentence, computed from the data, before it shows the data."""

from __future__ import annotations

from collections import Counter
from math import isfinite
from statistics import median

from smedjan.evaluate.stats import bootstrap_mean
from smedjan.report import svg
from smedjan.report.health import checks
from smedjan.report.markup import Child, Markup, el, join
from smedjan.report.model import Bench, Evaluation, Parity, Plan, RunReport, Step, mistakes
from smedjan.report.scale import byte_size, number, percent, wants_log

Section = tuple[str, str, Markup]
SAMPLES_SHOWN = 10
WORDS_SHOWN = 6
"""Steps at which the samples of a training run are shown."""

CAPTION = 200
"""Characters of a prompt above what the model made of it: its end."""


def sections(run: RunReport) -> list[Section]:
    """(anchor, title, body) of every section that has data."""
    made: list[Section | None] = [
        _scores(run.evaluation) if run.evaluation and run.evaluation.scores else None,
        _mistakes(run.evaluation) if run.evaluation and run.evaluation.samples else None,
        _samples(run.evaluation) if run.evaluation and run.evaluation.samples else None,
        _health(run) if run.header and run.steps else None,
        _training(run) if run.steps else None,
        _words(run) if run.words else None,
        _speed(run.bench) if run.bench and run.bench.rounds else None,
        _parity(run.parity) if run.parity else None,
        _plan(run.plan) if run.plan else None,
        _facts(run) if run.facts else None,
    ]
    return [section for section in made if section is not None]


def key_figures(run: RunReport) -> Markup | None:
    """Up to four figures a reader takes away."""
    shown: list[tuple[str, str]] = []
    if run.evaluation:
        ours = next((score for score in run.evaluation.scores if score.ours), None)
        if ours:
            interval = f", 95 % interval {_range(ours.interval)}" if ours.interval else ""
            shown.append((percent(ours.share), f"exact match on {run.evaluation.n} held-out items{interval}"))
        if run.evaluation.difference:
            gap = run.evaluation.difference
            low, high = (f"{value * 100:+.1f}" for value in gap.interval)
            shown.append((f"{gap.estimate * 100:+.1f}", f"points over {gap.over}, 95 % interval {low} to {high}"))
    if run.bench and run.bench.rounds:
        shown.append((f"{_ratio(run.bench):.2f}×", f"the tokens/s of {run.bench.baseline}"))
    if run.parity and run.parity.cases:
        held = sum(case.equal for case in run.parity.cases)
        shown.append((f"{held} / {len(run.parity.cases)}", "comparisons with transformers equal to the bit"))
    if run.steps and len(shown) < 4:
        last = run.evals[-1].loss if run.evals else run.steps[-1].loss
        which = "evaluation" if run.evals else "training"
        shown.append((number(last), f"{which} loss after {run.steps[-1].step:,} steps"))
    if not shown:
        return None
    return el("dl", *[el("div", el("dt", figure), el("dd", words)) for figure, words in shown[:4]], class_="figures")


def _scores(evaluation: Evaluation) -> Section:
    ranked = sorted(evaluation.scores, key=lambda score: (not score.ours, -score.share, score.name))
    best = ranked[0]
    finding = f"{best.name}: {percent(best.share)} of {evaluation.n} held-out items answered exactly"
    if best.interval:
        finding += f" (95 % interval {_range(best.interval)})"
    finding += "."
    gap = evaluation.difference
    if gap:
        low, high = (value * 100 for value in gap.interval)
        verdict = "above zero" if low > 0 else "below zero" if high < 0 else "on both sides of zero"
        finding += (
            f" That is {gap.estimate * 100:+.1f} points against {gap.over} on the same items;"
            f" the interval, {low:+.1f} to {high:+.1f}, lies {verdict}."
        )
    chart = svg.score_bars(ranked, title="Exact match on the held-out items", summary=finding)
    note = "Bars start at 0 %. Whiskers are 95 % intervals; an answer counts only if it is the same text."
    if evaluation.perplexity is not None and evaluation.nll is not None:
        note += (
            f" Negative log-likelihood {number(evaluation.nll)} a token, perplexity {number(evaluation.perplexity)}."
        )
    return _section("accuracy", "Accuracy", finding, el("figure", chart, class_="wide"), el("p", note, class_="note"))


def _mistakes(evaluation: Evaluation) -> Section:
    found = mistakes(evaluation.samples)
    wrong = sum(not sample.correct for sample in evaluation.samples)
    if not found:
        return _section("mistakes", "Mistakes", f"None among {len(evaluation.samples)} held-out items.")
    ending = _shared_ending(evaluation)
    rows = [
        [
            el("th", m.expected, scope="row", class_=_width(m.expected)),
            el("td", m.answer or "(nothing)", class_=_width(m.answer)),
            _num(str(m.count)),
            el("td", _quote(m.example, ending)),
        ]
        for m in found
    ]
    shown = sum(m.count for m in found)
    finding = f"{wrong} of {len(evaluation.samples)} answers are wrong. The commonest confusion is {found[0].expected}"
    finding += f" answered as {found[0].answer or 'nothing'}, {_times(found[0].count)}."
    table = _table(
        f"The {len(found)} commonest confusions, {shown} of {wrong} mistakes, each with the first item that shows it.",
        ["Expected", "Answered", "#Count", "Example"],
        rows,
    )
    return _section("mistakes", "Mistakes", finding, table)


def _samples(evaluation: Evaluation) -> Section:
    shown = evaluation.samples[:SAMPLES_SHOWN]
    ending = _shared_ending(evaluation)
    rows = [
        [
            el("td", _quote(sample.prompt, ending)),
            el("td", sample.expected, class_=_width(sample.expected)),
            el(
                "td",
                sample.answer or "(nothing)",
                class_=f"{'held' if sample.correct else 'failed'} {_width(sample.answer) or ''}".strip(),
            ),
        ]
        for sample in shown
    ]
    finding = (
        f"The first {len(shown)} of {len(evaluation.samples)} held-out items in the order of the file, not selected."
    )
    finding += f" Every prompt ends in the line “{ending.strip()}”, not repeated here." if ending.strip() else ""
    return _section("samples", "Held-out samples", finding, _table(None, ["Prompt", "Expected", "Answered"], rows))


def _training(run: RunReport) -> Section:
    steps = run.steps
    raw = [(float(step.step), step.loss) for step in steps]
    span = max(1, len(steps) // 25)
    lines = [svg.Series(name="each step", points=raw, style="raw")]
    legend = [el("span", "training loss of each step", class_="raw")]
    if span > 1:
        lines.append(svg.Series(name="mean", points=svg.smoothed(raw, span), style="ours"))
        legend.append(el("span", f"its mean over {span} steps", class_="ours"))
    else:
        lines[0] = svg.Series(name="training", points=raw, style="ours")
        legend = [el("span", "training loss", class_="ours")]
    first = sum(step.loss for step in steps[:span]) / span
    last = sum(step.loss for step in steps[-span:]) / span
    finding = f"Training loss went from {number(first)} to {number(last)} in {steps[-1].step:,} steps"
    finding += f" (means over the first and last {span} steps)" if span > 1 else ""
    if run.evals:
        points = [(float(point.step), point.loss) for point in run.evals]
        lines.append(svg.Series(name="evaluation", points=points, style="second", dots=True))
        legend.append(el("span", "evaluation loss", class_="second dotted"))
        lowest = min(run.evals, key=lambda point: point.loss if isfinite(point.loss) else float("inf"))
        finding += f"; evaluation loss ended at {number(run.evals[-1].loss)}, lowest {number(lowest.loss)}"
        finding += f" at step {lowest.step:,}"
    finding += "."
    peak = max((step.peak_bytes or 0 for step in steps), default=0)
    finding += f" Peak memory {byte_size(peak)}." if peak else ""
    broken = sum(not isfinite(step.loss) for step in steps)
    if broken:
        finding += f" {broken} steps had a loss that is not finite: the line breaks there."
    chart = svg.line_chart(lines, title="Loss", summary=finding, x_label="step", y_label="loss")
    figure = el("figure", el("div", *legend, class_="legend"), chart, class_="wide")
    return _section("training", "Training", finding, figure, _multiples(steps))


VERDICTS = {
    "good": ("held", "healthy"),
    "watch": ("watch", "watch"),
    "bad": ("failed", "red flag"),
    "early": ("", "too early"),
}


def _health(run: RunReport) -> Section:
    found = checks(run)
    flags = [check for check in found if check.verdict == "bad"]
    watch = [check for check in found if check.verdict == "watch"]
    finding = "No red flag." if not flags else f"Red flags: {', '.join(check.name.lower() for check in flags)}."
    finding += f" To watch: {', '.join(check.name.lower() for check in watch)}." if watch else ""
    rows = [
        [
            el("th", check.name, scope="row"),
            el("td", VERDICTS[check.verdict][1], class_=f"{VERDICTS[check.verdict][0]} short".strip()),
            el("td", check.value, data_label="Value"),
            el("td", check.healthy, data_label="Healthy"),
            el("td", check.red_flag, data_label="A red flag means"),
        ]
        for check in found
    ]
    head = ["Check", "Verdict", "Value", "Healthy looks like", "A red flag means"]
    return _section("health", "Health", finding, _table(None, head, rows, "stacked"))


def _words(run: RunReport) -> Section:
    """By prompt: the model's words at the first step they were sampled, at the last, and at some between."""
    steps = sorted({word.step for word in run.words})
    kept = {steps[round(index * (len(steps) - 1) / (WORDS_SHOWN - 1))] for index in range(WORDS_SHOWN)}
    prompts = dict.fromkeys(word.prompt for word in run.words)
    tables = []
    for prompt in prompts:
        rows = [
            [_num(f"{word.step:,}"), el("td", el("span", word.text or "(nothing)", class_="quote", dir="auto"))]
            for word in run.words
            if word.prompt == prompt and word.step in kept
        ]
        caption = f"After “{prompt.strip()[-CAPTION:]}”" if prompt.strip() else "After nothing"
        tables.append(_table(caption, ["#Step", "The model goes on"], rows, "dense"))
    finding = f"Greedy answers to {len(prompts)} prompts, sampled at {len(steps)} steps of training"
    finding += f"; {len(kept)} of them are shown." if len(kept) < len(steps) else "."
    return _section("words", "Samples while training", finding, *tables)


def _multiples(steps: tuple[Step, ...]) -> Markup | None:
    figures: list[Markup] = []
    columns: tuple[tuple[str, list[tuple[int, float | None]]], ...] = (
        ("Learning rate", [(s.step, s.lr) for s in steps]),
        ("Gradient norm", [(s.step, s.grad_norm) for s in steps]),
        ("Tokens a second", [(s.step, s.tokens_per_s) for s in steps]),
        ("MFU, % of the machine's peak", [(s.step, None if s.mfu is None else 100 * s.mfu) for s in steps]),
    )
    for name, column in columns:
        points = [(float(step), value) for step, value in column if value is not None]
        finite = [value for _, value in points if isfinite(value)]
        if len(finite) < 2:
            continue
        words = f"{number(min(finite))} to {number(max(finite))}"
        words += f", median {number(median(finite))}" if name != "Learning rate" else ""
        words += ", log scale" if wants_log(finite) else ""
        chart = svg.small_chart(points, title=name, summary=words)
        figures.append(el("figure", el("figcaption", el("b", name), el("span", words)), chart))
    return el("div", *figures, class_="multiples") if figures else None


def _speed(bench: Bench) -> Section:
    ratios = [ours / theirs for ours, theirs in bench.rounds]
    ours, theirs = (median(side) for side in zip(*bench.rounds, strict=True))
    finding = (
        f"{bench.what}: {number(ours)} tokens/s against {number(theirs)} of {bench.baseline} (medians),"
        f" a ratio of {_ratio(bench):.2f}"
    )
    if len(ratios) > 1:
        spread = bootstrap_mean(ratios)
        finding += f" (mean {spread.estimate:.2f}, 95 % interval {spread.low:.2f} to {spread.high:.2f})"
    finding += f". The two took turns, {len(ratios)} rounds in one run, so that both met the same machine."
    legend = el(
        "div",
        el("span", bench.subject, class_="ours dotted"),
        el("span", bench.baseline, class_="baseline dotted"),
        class_="legend",
    )
    chart = svg.round_pairs(
        bench.rounds,
        subject=bench.subject,
        baseline=bench.baseline,
        title="Tokens a second, round by round",
        summary=finding,
    )
    machine = el("p", f"Machine: {bench.machine}", class_="note") if bench.machine else None
    return _section("speed", "Speed", finding, el("figure", legend, chart, class_="wide"), machine)


def _parity(parity: Parity) -> Section:
    cases = parity.cases
    equal = sum(case.equal for case in cases)
    bounded = sum(case.held and not case.equal for case in cases)
    failed = len(cases) - equal - bounded
    finding = f"{equal} of {len(cases)} comparisons with transformers are equal to the bit"
    finding += f", {bounded} within their bound" if bounded else ""
    finding += f"; {failed} failed" if failed else ""
    finding += f". What ran: {parity.about}." if parity.about else "."
    rows = [
        [
            el("th", case.mode, scope="row", class_=_width(case.mode), title=case.name),
            el("td", case.attention),
            el("td", case.dtype),
            el("td", case.batch),
            el("td", case.padding),
            el("td", case.verdict, class_="held short" if case.held else "failed short"),
            _num(number(case.max_abs)),
            _num("" if case.error is None else number(case.error)),
            _num("" if case.bound is None else number(case.bound)),
        ]
        for case in cases
    ]
    head = ["Compared", "Attention", "Dtype", "Batch", "Padding", "Result", "#Largest difference", "#Error", "#Bound"]
    skipped = [el("p", f"Skipped: {name}: {reason}", class_="note") for name, reason in parity.skipped]
    return _section("parity", "Parity", finding, _table(None, head, rows, "dense") if rows else None, *skipped)


def _plan(plan: Plan) -> Section:
    by_lowering = Counter[str]()
    for op in plan.ops:
        by_lowering[op.lowering] += op.count
    finding = f"{sum(by_lowering.values()):,} ops a step, lowered as "
    finding += ", ".join(f"{name} ({count:,})" for name, count in by_lowering.most_common(4))
    finding += f" and {len(by_lowering) - 4} more" if len(by_lowering) > 4 else ""
    finding += "."
    if plan.flops_per_token is not None:
        finding += f" {number(plan.flops_per_token / 1e6)} MFLOP a token."
    if plan.planned_bytes is not None:
        finding += f" Planned memory {byte_size(plan.planned_bytes)}."
    rows = [
        [el("th", el("code", op.op), scope="row"), _num(f"{op.count:,}"), el("td", op.lowering)]
        for op in sorted(plan.ops, key=lambda op: (-op.count, op.op))
    ]
    return _section("plan", "What ran on what", finding, _table(None, ["Op", "#Count", "Lowering"], rows, "dense"))


def _facts(run: RunReport) -> Section:
    pairs: list[Child] = []
    for name, value in run.facts:
        pairs += [el("dt", name), el("dd", value, class_="mono" if _is_hash(value) else None)]
    return _section("run", "The run", "", el("dl", *pairs, class_="facts"))


def _section(name: str, title: str, finding: str, *body: Child) -> Section:
    heading = el("h2", title, id=f"{name}-title")
    return name, title, join(heading, el("p", finding) if finding else None, *body)


def _table(caption: str | None, head: list[str], rows: list[list[Markup]], style: str | None = None) -> Markup:
    """A heading that starts with # is that of a column of numbers."""
    cells = [el("th", name.lstrip("#"), scope="col", class_="num" if name.startswith("#") else None) for name in head]
    table = el(
        "table",
        el("caption", caption) if caption else None,
        el("thead", el("tr", *cells)),
        el("tbody", *[el("tr", *row) for row in rows]),
        class_=style,
    )
    return el("div", table, class_="wide")


def _num(text: str) -> Markup:
    return el("td", text, class_="num")


def _quote(text: str, ending: str) -> Markup:
    """A prompt without blank lines and without the ending that all share."""
    lines = [line.rstrip() for line in text.removesuffix(ending).splitlines() if line.strip()]
    return el("span", "\n".join(lines), class_="quote", dir="auto")


def _shared_ending(evaluation: Evaluation) -> str:
    """The last line of the prompts with its line break, where all have the same: an instruction of the task."""
    prompts = [sample.prompt for sample in evaluation.samples]
    endings = {prompt[prompt.rfind("\n") :] for prompt in prompts if "\n" in prompt}
    shared = len(prompts) > 1 and len(endings) == 1 and all("\n" in prompt for prompt in prompts)
    return endings.pop() if shared else ""


def _width(text: str) -> str | None:
    """Identifiers stay on one line: a break at their hyphens is hard to read."""
    return "short" if len(text) <= 28 else None


def _ratio(bench: Bench) -> float:
    return median(ours / theirs for ours, theirs in bench.rounds)


def _range(interval: tuple[float, float] | None) -> str:
    assert interval is not None
    return f"{interval[0] * 100:.1f} to {interval[1] * 100:.1f} %"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _is_hash(text: str) -> bool:
    return len(text) >= 12 and all(letter in "0123456789abcdef" for letter in text)
