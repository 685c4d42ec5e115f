"""Each check of the health table turns when, and only when, its data does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from smedjan.report.health import checks
from smedjan.report.html import render
from smedjan.report.model import EvalPoint, Header, RunReport, Step, Words
from smedjan.report.scale import duration

from .page import read

HEADER = Header(
    total_steps=100,
    clip=1.0,
    kept=50,
    unstopped=0,
    trained_share=0.3,
    planned_bytes=1_000_000_000,
    baseline_bytes=400_000_000,
)
STEPS = tuple(
    Step(
        step=number,
        loss=3.0 / (1 + number / 20),
        grad_norm=2.0 if number < 5 else 0.5,
        tokens_per_s=1000.0,
        peak_bytes=1_350_000_000,
        mfu=0.4,
        eta_s=100.0 - number,
        skipped=0,
    )
    for number in range(1, 101)
)
WELL = RunReport(
    title="run",
    header=HEADER,
    steps=STEPS,
    evals=(EvalPoint(step=50, loss=1.0), EvalPoint(step=100, loss=0.6)),
    words=(Words(step=50, prompt="a", text="b"), Words(step=100, prompt="a", text="<c>")),
)


def verdicts(run: RunReport) -> dict[str, str]:
    return {check.name: check.verdict for check in checks(run)}


def changed(**columns: Any) -> RunReport:
    """WELL with values of its last steps replaced: `loss=(10, 9.0)` is a loss of 9 in the last ten."""
    steps = list(STEPS)
    for name, (count, value) in columns.items():
        steps[-count:] = [replace(step, **{name: value}) for step in steps[-count:]]
    return replace(WELL, steps=tuple(steps))


def test_a_run_that_is_well() -> None:
    assert set(verdicts(WELL).values()) == {"good"}
    assert len(checks(WELL)) == 9
    text = read(render(WELL)).text
    assert "No red flag." in text
    assert "clipped steps" not in text.partition("Check")[0].lower()


NAN = float("nan")
SICK = {
    "a loss that rises": (changed(loss=(10, 9.0)), "Loss falls", "bad"),
    "a flat loss": (changed(loss=(100, 2.0)), "Loss falls", "watch"),
    "rows learnt by heart": (
        replace(WELL, evals=(EvalPoint(step=50, loss=0.6), EvalPoint(step=100, loss=0.9))),
        "Evaluation against training",
        "bad",
    ),
    "an evaluation that turns": (
        replace(WELL, evals=(EvalPoint(step=50, loss=0.60), EvalPoint(step=100, loss=0.63))),
        "Evaluation against training",
        "watch",
    ),
    "a spike": (changed(grad_norm=(1, 9.0)), "Gradient norm", "watch"),
    "many spikes": (changed(grad_norm=(4, 9.0)), "Gradient norm", "bad"),
    "a skipped step": (changed(skipped=(9, 1)), "Skipped steps", "watch"),
    "many skipped steps": (changed(skipped=(9, 9)), "Skipped steps", "bad"),
    "a loss that is not finite": (changed(loss=(1, NAN)), "Skipped steps", "watch"),
    "all clipped": (changed(grad_norm=(100, 1.5)), "Clipped steps", "watch"),
    "few trained tokens": (replace(WELL, header=replace(HEADER, trained_share=0.01)), "Trained tokens", "watch"),
    "some rows without a stop": (replace(WELL, header=replace(HEADER, unstopped=2)), "Rows that never stop", "watch"),
    "no row with a stop": (replace(WELL, header=replace(HEADER, unstopped=50)), "Rows that never stop", "bad"),
    "slower": (changed(tokens_per_s=(8, 700.0)), "Tokens a second", "watch"),
    "much slower": (changed(tokens_per_s=(8, 300.0)), "Tokens a second", "bad"),
    "more memory": (changed(peak_bytes=(1, 1_600_000_000)), "Memory against the plan", "watch"),
    "much more memory": (changed(peak_bytes=(1, 2_400_000_000)), "Memory against the plan", "bad"),
}


@pytest.mark.parametrize("case", SICK)
def test_one_sign_of_illness_and_no_other(case: str) -> None:
    run, name, verdict = SICK[case]
    found = verdicts(run)
    assert found.pop(name) == verdict
    assert set(found.values()) == {"good"}
    page = read(render(run)).text
    assert f"{'Red flags' if verdict == 'bad' else 'To watch'}: {name.lower()}." in page


def test_too_few_steps_say_nothing() -> None:
    found = verdicts(replace(WELL, steps=STEPS[:3], evals=()))
    assert found["Loss falls"] == found["Gradient norm"] == found["Tokens a second"] == "early"
    assert "bad" not in found.values()
    assert checks(replace(WELL, steps=())) == ()


def test_a_log_without_a_header_has_no_table_and_what_needs_it_is_left_out() -> None:
    assert set(verdicts(replace(WELL, header=None))) == {
        *("Loss falls", "Evaluation against training", "Gradient norm", "Skipped steps", "Tokens a second"),
    }
    assert "Health" not in read(render(replace(WELL, header=None))).text


def test_what_the_model_said_is_on_the_page_as_text() -> None:
    html = render(WELL)
    assert "&lt;c&gt;" in html
    assert "sampled at 2 steps" in read(html).text
    many = tuple(Words(step=step, prompt="a", text=f"t{step}") for step in range(1, 101))
    text = read(render(replace(WELL, words=many))).text
    assert "6 of them are shown" in text
    assert "t1 " in text
    assert "t100 " in text
    assert read(render(replace(WELL, words=many[:1]))).text.count("t1") == 1


def test_a_live_page_loads_itself_again_and_says_where_it_is() -> None:
    page = read(render(WELL, refresh=5))
    assert ("meta", {"http-equiv": "refresh", "content": "5"}) in page.elements
    assert "Step 100 of 100, about 0 s left." in page.text
    assert "refresh" not in render(WELL)


def test_durations_as_a_person_says_them() -> None:
    said = {0: "0 s", -3: "0 s", 59.4: "59 s", 60: "1 min", 3599: "59 min", 11_100: "3 h 5 min", 187_200: "2 d 4 h"}
    assert {seconds: duration(seconds) for seconds in said} == said
