"""The page of a comparison: well-formed, self-contained, and showing what failed, what held and what was skipped."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from smedjan.hf.parity import Case, ParityReport
from smedjan.hf.watch import Parted
from smedjan.report.parity import render, write_parity

from .page import read

PARTED = Parted(
    layer=2,
    behind=False,
    op="rope",
    primitive="mul",
    module="layers.2.self_attn",
    backward=False,
    ulp=3,
    peer="aten.mul in model.layers.2.self_attn",
)


def case(dtype: str, mode: str, *, ulp: int = 0, parted: Parted | None = None, bound: float = 0.0) -> Case:
    return Case(
        name=f"sdpa {dtype} {mode} padding=left",
        attention="sdpa",
        dtype=dtype,
        mode=mode,
        batch=2,
        seq=12,
        padding="left",
        equal=ulp == 0,
        max_abs=ulp * 1e-7,
        max_ulp=ulp,
        tensor="logits",
        error=bound / 2,
        bound=bound,
        parted=parted,
    )


REPORT = ParityReport(
    model_type="llama",
    layers=4,
    cases=(
        case("float32", "logits"),
        case("bfloat16", "logits"),
        case("float32", "decode", ulp=3, parted=PARTED),
        case("bfloat16", "decode", ulp=70_000, parted=PARTED),
        case("float32", "gradients", ulp=5),
    ),
    skipped=({"name": "eager float32", "reason": "a <reason> of transformers & no other"},),
    backend="torch_reference",
    exact=True,
    versions={"transformers": "5.23.0", "torch": "2.13.0"},
)


def test_it_is_well_formed_and_refers_to_nothing_outside() -> None:
    html = render(REPORT, title="tiny <model>")
    page = read(html)
    assert "tiny <model> " in page.text
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "srcset", "data", "action", "style"}, tag
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in html
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    for chart in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(chart)


def test_a_failure_comes_first_with_the_layer_marked() -> None:
    html = render(REPORT, title="tiny")
    page = read(html)
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections == ["parted", "cases", "skipped"]
    boxes = [attributes["class"] for tag, attributes in page.elements if tag == "rect"]
    assert boxes == ["done", "done", "done", "parted", "after", "after"]
    assert "layer 2, rope: 3 ulp" in page.text
    assert "2 cases part at 1 place" in page.text
    assert "aten.mul in model.layers.2.self_attn" in page.text
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert [chart["role"] for chart in charts] == ["img"]
    assert charts[0]["aria-label"].endswith("parts at layer 2, rope.")


@pytest.mark.parametrize(
    ("changes", "place"),
    [({"layer": None}, 0), ({"layer": None, "behind": True}, 5), ({"layer": 0}, 1), ({"layer": 3}, 4)],
)
def test_the_place_of_the_mark(changes: dict, place: int) -> None:
    parted = replace(PARTED, **changes)
    page = read(render(replace(REPORT, cases=(case("float32", "logits", ulp=3, parted=parted),)), title="tiny"))
    boxes = [attributes["class"] for tag, attributes in page.elements if tag == "rect"]
    assert boxes.index("parted") == place
    assert boxes.count("parted") == 1


def test_cases_side_by_side_and_tinted_by_distance() -> None:
    page = read(render(REPORT, title="tiny"))
    cells = [
        attributes["class"]
        for tag, attributes in page.elements
        if tag == "td" and "heat" in attributes.get("class", "")
    ]
    assert cells == ["heat", "heat", "heat heat-1", "heat heat-3", "heat heat-1"]
    assert page.text.count("not compared") >= 1
    assert "2 of 5 cases are equal to the bit" in page.text
    assert "70,000 ulp" in page.text


def test_skipped_with_its_reason() -> None:
    text = read(render(REPORT, title="tiny")).text
    assert "eager float32 a <reason> of transformers & no other" in text
    assert "None of this counts as passing" in text


def test_all_equal_has_neither_strip_nor_skipped() -> None:
    page = read(render(replace(REPORT, cases=REPORT.cases[:2], skipped=()), title="tiny"))
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == ["cases"]
    assert "svg" not in page.tags


def test_a_fast_backend_shows_error_and_bound() -> None:
    cases = (case("float32", "logits", ulp=9, bound=1e-6), case("float32", "decode"))
    text = read(render(replace(REPORT, cases=cases, exact=False, backend="cpu_native"), title="tiny")).text
    assert "9 ulp, 5e-7 of 1e-6" in text
    assert "within the bound of rounding alone" in text


def test_nothing_compared() -> None:
    page = read(render(replace(REPORT, cases=()), title="tiny"))
    assert "0 / 0" in page.text


def test_it_is_written_whole(tmp_path: Path) -> None:
    target = write_parity(tmp_path / "page.html", REPORT, title="tiny")
    assert target.read_text() == render(REPORT, title="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
