"""The page of an inspection: every token of the samples in order, the trained ones marked; no row is markup."""

from __future__ import annotations

from smedjan.data.inspect import Inspection, Lengths, Piece, Sample
from smedjan.data.mask import Counts
from smedjan.report.rows import render, write_rows

from .page import read

SAMPLE = Sample(
    source="line 7",
    truncated=True,
    pieces=(
        Piece(ids=(5,), text="ask <script>", trained=False),
        Piece(ids=(17, 18), text="four\n", trained=True),
        Piece(ids=(2,), text="", trained=True),
    ),
)
FOUND = Inspection(
    counts=Counts(kept=3, truncated=1, dropped=2, broken=3, unstopped=1),
    tokens=40,
    trained_tokens=10,
    longest=99,
    lengths=Lengths(min=8, median=12, p95=20, max=20),
    samples=(SAMPLE,),
)


def test_the_page_shows_tokens_and_counts():
    html = render(FOUND, title="rows.jsonl")
    page = read(html)
    spans = [found for tag, found in page.elements if tag == "span"]
    assert [(found["title"], found.get("class")) for found in spans] == [
        ("5", None),
        ("17 18", "trained"),
        ("2", "trained"),
    ]
    assert "script" not in page.tags
    assert "ask <script>" in page.pieces
    assert "four\u23ce\n" in page.pieces
    for said in (
        "3 kept, 1 truncated, 2 dropped, 3 broken",
        "trained 10 (25.0%)",
        "8 to 20, median 12",
        "line 7, truncated",
    ):
        assert said in page.text
    assert "1 rows train no stop token" in page.text


def test_it_is_written_whole(tmp_path):
    written = write_rows(tmp_path / "rows.html", FOUND, title="rows.jsonl")
    assert written.read_text() == render(FOUND, title="rows.jsonl")
