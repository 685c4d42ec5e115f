"""The charts: inline SVG, coloured by classes of style.py, so that they follow the page into dark mode and onto paper.

Each is an image to a screen reader, with a title and a sentence that carries its message. Marks have a <title>, which
browsers show as a hint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite

from smedjan.report.markup import Markup, el, join
from smedjan.report.model import Score
from smedjan.report.scale import Scale, number, over, percent, wants_log

Points = list[tuple[float, float]]
MOST_POINTS = 400
"""Marks of one line. A longer run is drawn by the lowest and highest of each bucket: no spike is lost."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line. `style` is a class of style.py; `dots` marks each point, for lines of few points."""

    name: str
    points: Points
    style: str
    dots: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    summary: str,
    x_label: str,
    y_label: str,
    width: int = 760,
    height: int = 320,
) -> Markup:
    """Lines over one x axis; the y axis is logarithmic where the values span a factor of 30."""
    values = [y for one in series for _, y in one.points if isfinite(y)]
    steps = [x for one in series for x, _ in one.points]
    log = wants_log(values)
    left, right, top, bottom = 58, 14, 26, 40
    x = _steps(steps, left, width - right)
    y = over(values, height - bottom, top, zero=not log, log=log)
    parts: list[Markup] = [_y_axis(y, left, width - right), _x_axis(x, height - bottom)]
    parts.append(el("text", y_label + (", log scale" if log else ""), x=0, y=12, class_="label"))
    parts.append(el("text", x_label, x=width - right, y=height - 4, class_="label", text_anchor="end"))
    for one in series:
        parts.append(_line(one, x, y))
    return _image(title, summary, width, height, parts)


def small_chart(points: Points, *, title: str, summary: str, style: str = "plain", unit: str = "") -> Markup:
    """One line of a row of small multiples: two y ticks, first and last x."""
    width, height, left, bottom, top = 260, 140, 48, 24, 12
    values = [v for _, v in points if isfinite(v)]
    log = wants_log(values)
    steps = [s for s, _ in points]
    x = _steps(steps, left, width - 8)
    y = over(values, height - bottom, top, zero=not log, log=log)
    parts = [_y_axis(y, left, width - 8, about=4), _line(Series(name=title, points=points, style=style), x, y)]
    for at, anchor in ((min(steps), "start"), (max(steps), "end")):
        parts.append(el("text", number(at), x=x(at), y=height - 6, class_="tick", text_anchor=anchor))
    return _image(title, summary, width, height, parts)


def score_bars(scores: Sequence[Score], *, title: str, summary: str) -> Markup:
    """Horizontal bars from 0 to 100 %, each with its 95 % interval as a whisker."""
    width, row, left, top = 760, 40, 276, 8
    height = top + row * len(scores) + 28
    x = Scale(low=0, high=1, start=left, stop=width - 74)
    base = top + row * len(scores)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        parts.append(el("line", x1=x(tick), x2=x(tick), y1=top, y2=base, class_="grid"))
        parts.append(
            el("text", f"{tick:.0%}".replace("%", " %"), x=x(tick), y=base + 18, class_="tick", text_anchor="middle")
        )
    for index, score in enumerate(scores):
        middle = top + row * index + row / 2
        label = percent(score.share)
        hint = f"{score.name}: {label}"
        if score.interval:
            hint += f", 95 % interval {percent(score.interval[0])} to {percent(score.interval[1])}"
        parts.append(
            el(
                "g",
                el("title", hint),
                el(
                    "text",
                    _cut(score.name, 40),
                    x=left - 12,
                    y=middle + 4.5,
                    class_="name ours" if score.ours else "name",
                    text_anchor="end",
                ),
                el(
                    "rect",
                    x=left,
                    y=middle - 10,
                    width=max(x(score.share) - left, 1.0),
                    height=20,
                    rx=2,
                    class_="bar ours" if score.ours else "bar",
                ),
                _whisker(x, middle, score.interval) if score.interval else None,
                el(
                    "text",
                    label,
                    x=width - 4,
                    y=middle + 4.5,
                    class_="value ours" if score.ours else "value",
                    text_anchor="end",
                ),
            )
        )
    return _image(title, summary, width, height, parts)


def round_pairs(
    rounds: Sequence[tuple[float, float]], *, subject: str, baseline: str, title: str, summary: str
) -> Markup:
    """Tokens a second of both programs in each round: two dots, and the bar between them."""
    width, row, left, top = 760, 24, 96, 10
    height = top + row * len(rounds) + 44
    base = top + row * len(rounds)
    x = over([value for pair in rounds for value in pair], left, width - 74, zero=True)
    parts = []
    for tick in x.ticks(6):
        parts.append(el("line", x1=x(tick), x2=x(tick), y1=top, y2=base, class_="grid"))
        parts.append(el("text", number(tick), x=x(tick), y=base + 18, class_="tick", text_anchor="middle"))
    parts.append(el("text", "tokens / s", x=width - 74, y=height - 6, class_="label", text_anchor="end"))
    for index, (ours, theirs) in enumerate(rounds):
        y = top + row * index + row / 2
        parts.append(
            el(
                "g",
                el("title", f"round {index + 1}: {subject} {number(ours)}, {baseline} {number(theirs)} tokens/s"),
                el("text", f"round {index + 1}", x=left - 12, y=y + 4.5, class_="name", text_anchor="end"),
                el("line", x1=x(theirs), x2=x(ours), y1=y, y2=y, class_="span"),
                el("circle", cx=x(theirs), cy=y, r=5, class_="dot baseline"),
                el("circle", cx=x(ours), cy=y, r=5.5, class_="dot ours"),
                el("text", f"{ours / theirs:.2f}×", x=width - 4, y=y + 4.5, class_="value", text_anchor="end"),
            )
        )
    return _image(title, summary, width, height, parts)


def smoothed(points: Points, span: int) -> Points:
    """The mean of the last `span` values at each point: noise leaves, nothing is seen before it happened."""
    result: Points = []
    window: list[float] = []
    for x, y in points:
        if isfinite(y):
            window = [*window[-(span - 1) :], y] if span > 1 else [y]
            result.append((x, sum(window) / len(window)))
    return result


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    if len(points) <= most:
        return points
    buckets = max(1, most // 2)
    result: Points = []
    for start in range(buckets):
        bucket = points[start * len(points) // buckets : (start + 1) * len(points) // buckets]
        finite = [point for point in bucket if isfinite(point[1])]
        if len(finite) < len(bucket) or not finite:
            result.append((bucket[0][0], float("nan")))
        result.extend(sorted({min(finite, key=_height), max(finite, key=_height)}) if finite else [])
    return result


def _steps(steps: Sequence[float], start: float, stop: float) -> Scale:
    return Scale(low=min(steps), high=max(max(steps), min(steps) + 1), start=start, stop=stop)


def _height(point: tuple[float, float]) -> float:
    return point[1]


def _line(series: Series, x: Scale, y: Scale) -> Markup:
    parts: list[Markup] = []
    # A line is broken where the loss was not finite: a bridge would hide that.
    for finite, run in groupby(thinned(series.points), key=lambda point: isfinite(point[1])):
        points = [f"{x(step):.2f},{y(value):.2f}" for step, value in run] if finite else []
        if points:
            parts.append(el("polyline", points=" ".join(points), class_=f"line {series.style}"))
    if series.dots:
        for step, value in series.points:
            if isfinite(value):
                hint = el("title", f"{series.name} at {number(step)}: {number(value)}")
                parts.append(el("circle", hint, cx=x(step), cy=y(value), r=4, class_=f"dot {series.style}"))
    return el("g", *parts)


def _y_axis(y: Scale, left: float, right: float, about: int = 5) -> Markup:
    parts = []
    for tick in y.ticks(about):
        at = y(tick)
        parts.append(el("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(el("text", number(tick), x=left - 8, y=at + 4, class_="tick", text_anchor="end"))
    return el("g", *parts)


def _x_axis(x: Scale, base: float) -> Markup:
    parts = [el("line", x1=x.start, x2=x.stop, y1=base, y2=base, class_="axis")]
    for tick in x.ticks(8):
        if tick == int(tick):
            parts.append(el("text", number(tick), x=x(tick), y=base + 18, class_="tick", text_anchor="middle"))
    return el("g", *parts)


def _whisker(x: Scale, y: float, interval: tuple[float, float]) -> Markup:
    low, high = x(interval[0]), x(interval[1])
    return el(
        "g",
        el("line", x1=low, x2=high, y1=y, y2=y, class_="whisker"),
        el("line", x1=low, x2=low, y1=y - 5, y2=y + 5, class_="whisker"),
        el("line", x1=high, x2=high, y1=y - 5, y2=y + 5, class_="whisker"),
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _image(title: str, summary: str, width: int, height: int, parts: Sequence[Markup]) -> Markup:
    return el(
        "svg",
        join(*parts),
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=f"{title}. {summary}",
        class_="chart" if width > 400 else "chart small",
    )
