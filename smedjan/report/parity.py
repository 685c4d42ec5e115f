"""`write_parity`: the page of a comparison with transformers. One HTML file that needs nothing else.

What failed comes first: the layers in a strip, the one where the two computations part marked, and the op in words.
Then every case, float32 beside bfloat16, tinted by its distance in ULPs, and what was not compared with the reason.
"""

from __future__ import annotations

from math import log2
from os import PathLike
from pathlib import Path

from smedjan.checkpoint.atomic import write_atomic
from smedjan.hf.parity import Case, ParityReport
from smedjan.hf.watch import Parted
from smedjan.report.markup import Markup, el
from smedjan.report.page import page
from smedjan.report.scale import number

_HEAT = 5
_CSS = """
td.heat { white-space: nowrap; }
svg .done { fill: var(--second); }
svg .parted { fill: var(--ours); }
svg .after { fill: var(--rule); }
svg .mark { fill: var(--ours); font-size: 13px; font-weight: 650; }
.cases { margin: .3rem 0 0; padding-left: 1.2rem; font-size: .88rem; color: var(--muted); }
""" + "".join(
    f"td.heat-{step} {{ background: color-mix(in srgb, var(--ours) {12 * step}%, transparent); }}\n"
    for step in range(1, _HEAT + 1)
)


def write_parity(path: str | PathLike[str], report: ParityReport, *, title: str) -> Path:
    """Write the page of `report` to `path`, whole or not at all."""
    target = Path(path)
    write_atomic(target, render(report, title=title).encode())
    return target


def render(report: ParityReport, *, title: str) -> str:
    """The page as text."""
    sections = [part for part in (_parted(report), _cases(report), _skipped(report)) if part is not None]
    header = el(
        "header",
        el("p", "smedjan · parity with transformers", class_="eyebrow"),
        el("h1", title),
        el("p", f"{report.model_type}, {report.layers} layers, on {report.backend}", class_="subtitle"),
        _figures(report),
    )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    footer = el("footer", el("div", el("p", f"Made with {versions}.")))
    return page(f"{title} · parity", header, el("main", *sections), footer, css=_CSS)


def _figures(report: ParityReport) -> Markup:
    cases = report.cases
    equal, failed = sum(case.equal for case in cases), sum(not case.holds for case in cases)
    pairs = [(f"{equal} / {len(cases)}", "cases equal to the bit")]
    if not report.exact:
        pairs.append((str(sum(case.holds for case in cases)), "within the bound of rounding alone"))
    pairs.append((str(failed), "failed"))
    pairs.append((str(len(report.skipped)), "not compared"))
    return el("dl", *[el("div", el("dt", figure), el("dd", words)) for figure, words in pairs], class_="figures")


def _section(name: str, title: str, finding: str, *body: Markup | None) -> Markup:
    heading = el("h2", title, id=f"{name}-title")
    return el("section", heading, el("p", finding), *body, id=name, aria_labelledby=f"{name}-title")


def _parted(report: ParityReport) -> Markup | None:
    """One strip for each place where cases part; cases whose place is unknown are in the table alone."""
    places: dict[Parted, list[Case]] = {}
    for case in report.cases:
        if case.parted is not None:
            places.setdefault(case.parted, []).append(case)
    if not places:
        return None
    body = []
    for parted, cases in places.items():
        near = f" The nearest value in transformers is that of {parted.peer}." if parted.peer else ""
        where = f"In {parted.module}, {parted.primitive}." if parted.module else f"In {parted.primitive}."
        names = el("ul", *[el("li", case.name) for case in cases], class_="cases")
        body.append(el("h3", str(parted)))
        body.append(el("figure", _strip(parted, report.layers), class_="wide"))
        body.append(el("p", where + near, class_="note"))
        body.append(names)
    finding = (
        f"{sum(map(len, places.values()))} cases part at {len(places)} {'place' if len(places) == 1 else 'places'}:"
    )
    return _section("parted", "Where they part", f"{finding} the first value that transformers does not make.", *body)


def _strip(parted: Parted, layers: int) -> Markup:
    """Embedding, layers and head as boxes from left to right; what runs before the parting is filled."""
    names = ["embedding", *(f"layer {layer}" for layer in range(layers)), "head"]
    place = parted.layer + 1 if parted.layer is not None else len(names) - 1 if parted.behind else 0
    width, top, height = 760, 4, 26
    each = width / len(names)
    boxes = []
    for index, name in enumerate(names):
        # The whole forward pass has run where the backward pass parts.
        style = "parted" if index == place else "done" if parted.backward or index < place else "after"
        box = el("rect", x=index * each, y=top, width=max(each - 2, 1.0), height=height, rx=2, class_=style)
        boxes.append(el("g", el("title", f"{name}: parts here" if index == place else name), box))
    middle = min(max((place + 0.5) * each, 60.0), width - 60.0)
    mark = el(
        "text", f"{names[place]}: {parted.op}", x=middle, y=top + height + 18, text_anchor="middle", class_="mark"
    )
    which = "backward" if parted.backward else "forward"
    words = f"{len(names)} parts of the model in order. The {which} pass parts at {names[place]}, {parted.op}."
    return el(
        "svg",
        *boxes,
        mark,
        viewBox=f"0 0 {width} {top + height + 26}",
        role="img",
        aria_label=words,
        class_="chart",
    )


def _cases(report: ParityReport) -> Markup | None:
    if not report.cases:
        return None
    dtypes = list(dict.fromkeys(case.dtype for case in report.cases))
    rows: dict[tuple[str, str, str], dict[str, Case]] = {}
    for case in report.cases:
        rows.setdefault((case.attention, case.mode, case.padding), {})[case.dtype] = case
    head = [el("th", name, scope="col") for name in ("Attention", "Compared", "Padding", "Tokens", *dtypes)]
    body = []
    for (attention, mode, padding), by_dtype in rows.items():
        tokens = next(iter(by_dtype.values())).seq
        cells = [_cell(by_dtype[dtype]) if dtype in by_dtype else el("td", "not compared") for dtype in dtypes]
        words = [el("td", mode), el("td", padding), el("td", str(tokens), class_="num")]
        body.append(el("tr", el("th", attention, scope="row"), *words, *cells))
    caption = "Darker is further from transformers: each step is 6 binary digits of the largest distance in ULPs."
    table = el("table", el("caption", caption), el("thead", el("tr", *head)), el("tbody", *body), class_="dense")
    equal = sum(case.equal for case in report.cases)
    finding = f"{equal} of {len(report.cases)} cases are equal to the bit."
    if not report.exact:
        finding += " The others are held to a bound: no more than twice transformers' own error, against float64."
    return _section("cases", "Cases", finding, el("div", table, class_="wide"))


def _cell(case: Case) -> Markup:
    if case.equal:
        return el("td", el("span", "equal", class_="held"), class_="heat", title=case.name)
    words = f"{case.max_ulp:,} ulp"
    if case.bound:
        words += f", {number(case.error)} of {number(case.bound)}"
    step = min(_HEAT, 1 + int(log2(max(case.max_ulp, 1)) / 6))
    verdict = el("span", words, class_="held" if case.holds else "failed")
    return el("td", verdict, class_=f"heat heat-{step}", title=f"{case.name}: {case.tensor}")


def _skipped(report: ParityReport) -> Markup | None:
    if not report.skipped:
        return None
    rows = [el("tr", el("th", skip["name"], scope="row"), el("td", skip["reason"])) for skip in report.skipped]
    head = el("tr", el("th", "What", scope="col"), el("th", "Why", scope="col"))
    table = el("div", el("table", el("thead", head), el("tbody", *rows)), class_="wide")
    return _section("skipped", "Not compared", "None of this counts as passing.", table)
