"""The page: well-formed, self-contained, inert whatever text it holds, and showing the numbers that it was given."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from smedjan.errors import CheckpointError
from smedjan.report import svg
from smedjan.report.html import render, write_report
from smedjan.report.model import (
    Bench,
    Difference,
    EvalPoint,
    Evaluation,
    Lowering,
    Parity,
    ParityCase,
    Plan,
    RunReport,
    Sample,
    Score,
    Step,
)
from smedjan.report.run_dir import from_run

from .page import read

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav", "section", "div"),
    *("h1", "h2", "p", "a", "dl", "dt", "dd", "figure", "figcaption", "b", "span", "code"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "line", "polyline", "circle", "rect", "text"),
}


@pytest.fixture
def html(run_dir: Path) -> str:
    return render(from_run(run_dir))


def test_it_is_well_formed_and_only_made_of_known_elements(html: str) -> None:
    assert html.startswith("<!doctype html>\n")
    page = read(html)
    assert page.tags <= TAGS
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) == 6
    for chart in charts:
        ElementTree.fromstring(chart)


def test_it_refers_to_nothing_outside(html: str) -> None:
    page = read(html)
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "srcset", "data", "action", "xlink:href", "style"}, tag
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in html
    assert "@import" not in html
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_links_lead_to_sections_with_headings(html: str) -> None:
    page = read(html)
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    targets = {attributes["href"][1:] for _, attributes in page.elements if "href" in attributes}
    assert targets == {attributes["id"] for tag, attributes in page.elements if tag == "section"}
    labelled = {attributes["aria-labelledby"] for tag, attributes in page.elements if tag == "section"}
    assert labelled <= set(names)


def test_charts_and_tables_are_named_for_screen_readers(html: str) -> None:
    page = read(html)
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"]) > 20
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    assert page.elements[0] == ("html", {"lang": "en"})


def test_the_numbers_are_those_given(html: str) -> None:
    text = read(html).text
    for said in (
        *("94.3 %", "95 % interval 91.7 to 96.7 %", "86.7 %", "18.7 %", "+7.6", "+4.1 to +11.3, lies above zero"),
        *("perplexity 1.063", "evaluation loss ended at 0.3141, lowest 0.2718 at step 30", "Peak memory 2.3 GB"),
        *("1.50×", "1.40×", "300 tokens/s against 200", "a ratio of 1.50", "3 rounds"),
        *(
            "1 of 3 comparisons with transformers are equal to the bit, 1 within their bound; 1 failed",
            "3.2e-5",
            "3.3e-6",
            "8.1e-6",
        ),
        *("1 / 3", "Skipped: flash: no such path", "272 ops a step", "aten.mm (211)", "840 MFLOP a token"),
        *("3 of 4 answers are wrong", "ISC answered as MIT, twice", "second notice", "(nothing)"),
        *("4be1d0c92f7a", "Rules by ScanCode, CC-BY-4.0.", "Made with smedjan 0.1.0, torch 2.13.0."),
    ):
        assert said in text, said


def test_the_figures_on_top_are_those_given(html: str) -> None:
    figures = html[html.index('class="figures"') : html.index("<nav")]
    assert re.findall(r"<dt>(.*?)</dt>", figures) == ["94.3 %", "+7.6", "1.50×", "1 / 3"]


def test_prompts_lose_the_line_that_all_share(html: str) -> None:
    text = read(html).text
    assert "Every prompt ends in the line “SPDX:”, not repeated here." in text
    assert text.count("SPDX:") == 1


HOSTILE = '</style></title><script>alert(1)</script><img src=x onerror="alert(2)">\'"&<!--\x00\x1b\ud800]]>'


def hostile_report() -> RunReport:
    h = HOSTILE
    return RunReport(
        title=h,
        subtitle=h,
        facts=((h, h),),
        versions=((h, h),),
        notes=(h,),
        steps=(Step(step=1, loss=1.0), Step(step=2, loss=0.5)),
        bench=Bench(subject=h, baseline=h, what=h, machine=h, rounds=((2.0, 1.0),)),
        evaluation=Evaluation(
            n=2,
            scores=(
                Score(name=h, share=0.5, interval=(0.1, 0.9), ours=True),
                Score(name=h + "b", share=0.2, interval=None),
            ),
            difference=Difference(over=h, estimate=0.1, interval=(0.0, 0.2)),
            samples=(Sample(prompt=h, expected=h, answer="no"), Sample(prompt=f"x\n{h}", expected=h, answer=h)),
        ),
        parity=Parity(
            cases=(
                ParityCase(
                    name=h,
                    attention=h,
                    dtype=h,
                    mode=h,
                    batch=h,
                    padding=h,
                    equal=False,
                    max_abs=1.0,
                    max_ulp=None,
                    error=None,
                    bound=None,
                ),
            ),
            skipped=((h, h),),
            about=h,
        ),
        plan=Plan(ops=(Lowering(op=h, count=1, lowering=h),)),
    )


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    written = write_report(tmp_path / "report.html", hostile_report()).read_text(encoding="utf-8")
    page = read(written)
    assert page.tags <= TAGS
    assert "<!--" not in written
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
    # It is all there to read, with what no page may hold replaced.
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "\x00" not in written
    assert "\x1b" not in written
    assert "\ufffd" in written


@pytest.mark.parametrize("part", ["steps", "bench", "evaluation", "parity", "plan", "facts"])
def test_each_section_stands_alone_and_can_be_absent(run_dir: Path, part: str) -> None:
    full = from_run(run_dir)
    empty: dict[str, object] = {"steps": (), "facts": ()}
    without = read(render(replace(full, **{part: empty.get(part)})))  # type: ignore[arg-type]
    alone = read(render(replace(RunReport(title="alone"), **{part: getattr(full, part)})))  # type: ignore[arg-type]
    sections = {"steps": 1, "bench": 1, "evaluation": 3, "parity": 1, "plan": 1, "facts": 1}

    def count(page: object) -> int:
        return sum(tag == "section" for tag, _ in page.elements)  # type: ignore[attr-defined]

    assert count(without) == 8 - sections[part]
    assert count(alone) == sections[part]


def test_an_empty_report_is_still_a_page() -> None:
    page = read(render(RunReport(title="Nothing yet")))
    assert "Nothing yet" in page.text


def test_a_loss_that_is_not_finite_breaks_the_line() -> None:
    losses = [1.0, 0.9, float("nan"), 0.8, float("inf"), 0.7, 0.6]
    steps = tuple(Step(step=i, loss=loss) for i, loss in enumerate(losses, 1))
    html = render(RunReport(title="diverged", steps=steps, evals=(EvalPoint(step=3, loss=float("nan")),)))
    assert html.count('class="line ours"') == 3
    assert "2 steps had a loss that is not finite" in html
    assert not re.search(r'(points|x|y|cx|cy)="[^"]*(nan|inf)', html)


def test_a_long_run_is_thinned_and_keeps_its_spikes() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321], points[8765] = (4321.0, 50.0), (8765.0, 0.01)
    thin = svg.thinned(points)
    assert len(thin) <= svg.MOST_POINTS
    assert (4321.0, 50.0) in thin
    assert (8765.0, 0.01) in thin
    assert thin == sorted(thin)


def test_bars_are_as_long_as_their_shares() -> None:
    scores = [Score(name=str(share), share=share, interval=None) for share in (0.0, 0.25, 0.5, 1.0)]
    chart = ElementTree.fromstring(svg.score_bars(scores, title="t", summary="s"))
    none, quarter, half, whole = (float(bar.attrib["width"]) for bar in chart.iter("rect"))
    assert none == 1
    assert quarter * 4 == pytest.approx(whole, rel=1e-3)
    assert half * 2 == pytest.approx(whole, rel=1e-3)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        write_report(tmp_path / "nowhere" / "report.html", RunReport(title="x"))
    assert error.value.file == str(tmp_path / "nowhere" / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_gives_the_same_bytes(run_dir: Path) -> None:
    assert render(from_run(run_dir)) == render(from_run(run_dir))
