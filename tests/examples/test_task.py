"""The rows are what the README says: the right notices, none of the test near one that is trained on, reproducible."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import task

from smedjan.errors import DataError

SPDX = Path(task.__file__).parent


@pytest.fixture(scope="module")
def built() -> task.Task:
    return task.build()


def test_sizes_and_labels(built: task.Task) -> None:
    assert (len(built.train), len(built.valid), len(built.test)) == (1200, 60, 300)
    identifiers = {notice.spdx for notice in built.train}
    assert len(identifiers) == 20
    assert {notice.spdx for notice in [*built.test, *built.valid]} <= identifiers
    assert not any(spdx.startswith("LicenseRef-") for spdx in identifiers)
    # Over a tenth, under a third: the draw is natural, neither stratified flat nor all of one kind.
    commonest = Counter(notice.spdx for notice in built.test).most_common(1)[0]
    assert commonest[0] == "MIT"
    assert 30 < commonest[1] < 100


def test_every_notice_fits_the_issue(built: task.Task) -> None:
    for notice in [*built.train, *built.valid, *built.test]:
        assert 10 <= len(notice.text.split()) <= 50, notice
        assert "{{" not in notice.text, notice
        assert "}}" not in notice.text, notice
        assert notice.row() == {"prompt": f"{notice.text}\nSPDX: ", "completion": notice.spdx}


def test_rules_are_the_notices_that_scancode_says(built: task.Task) -> None:
    """Read again from the files, with another reader of their front matter."""
    import yaml

    rules = task._data_folder() / "rules"
    licences = task._data_folder() / "licenses"
    for notice in built.test[:60]:
        _, head, body = (rules / notice.rule).read_text(encoding="utf-8").split("---\n", 2)
        fields = yaml.safe_load(head)
        assert fields["is_license_notice"] is True
        licence = (licences / f"{fields['license_expression']}.LICENSE").read_text(encoding="utf-8")
        assert yaml.safe_load(licence.split("---", 2)[1])["spdx_license_key"] == notice.spdx
        assert re.sub(r"\{\{|\}\}", "", body).strip() == notice.text


@pytest.mark.parametrize("split", [str.split, lambda text: re.findall(r"\w+", text)], ids=["spaces", "letters"])
@pytest.mark.parametrize("whole_prompt", [False, True], ids=["notice", "prompt"])
def test_no_held_out_notice_is_near_another(built: task.Task, split: object, whole_prompt: bool) -> None:
    assert callable(split)

    def bag(notice: task.Notice) -> set[str]:
        return set(split((notice.row()["prompt"] if whole_prompt else notice.text).lower()))

    train = [bag(notice) for notice in built.train]
    held_out = [bag(notice) for notice in [*built.test, *built.valid]]
    for index, mine in enumerate(held_out):
        worst = max(
            len(mine & other) / len(mine | other) for other in [*train, *held_out[:index], *held_out[index + 1 :]]
        )
        assert worst < 0.7, (index, worst)


def test_no_row_is_there_twice(built: task.Task) -> None:
    texts = [" ".join(notice.text.lower().split()) for notice in [*built.train, *built.valid, *built.test]]
    assert len(set(texts)) == len(texts)


def test_command_writes_the_same_rows_whatever_the_hash_seed(built: task.Task, tmp_path: Path) -> None:
    command = [sys.executable, str(SPDX / "task.py"), str(tmp_path / "out")]
    run = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    for name in ("train", "valid", "test"):
        text = (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8")
        assert text.isascii(), "a line separator inside a notice would end the row for some readers"
        assert [json.loads(line) for line in text.splitlines()] == [n.row() for n in getattr(built, name)]
    printed = json.loads(run.stdout)
    assert printed == json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert printed["rows"] == {"train": 1200, "valid": 60, "test": 300}
    assert sum(printed["identifiers"]["train"].values()) == 1200
    assert "CC-BY-4.0" in printed["source"]
    assert printed["notices_with_an_spdx_tag"]["test"] == sum("SPDX" in n.text for n in built.test)


def test_near_is_at_seven_tenths() -> None:
    ten = frozenset("abcdefghij")
    disjoint = frozenset("x"), frozenset("y")
    assert task.near((frozenset("abcdefg"), disjoint[0]), (ten, disjoint[1]))
    assert not task.near((frozenset("abcdef"), disjoint[0]), (ten, disjoint[1]))
    # Either way of counting words is enough.
    assert task.near((disjoint[0], ten), (disjoint[1], ten))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("PACKAGE", "licensedcode-nowhere", "not installed"), ("VERSION", "31.0", "rules differ")],
)
def test_another_package_is_one_line_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setattr(task, name, value)
    with pytest.raises(DataError, match=said) as error:
        task.build()
    assert error.value.remedy == f"pip install {task.PACKAGE}=={task.VERSION}"


def test_a_rule_without_front_matter_is_named(tmp_path: Path) -> None:
    rule = tmp_path / "x.RULE"
    rule.write_text("no front matter\n")
    with pytest.raises(DataError, match="front matter") as error:
        task._front_matter(rule)
    assert error.value.file == str(rule)
