"""A licence notice in, its SPDX identifier out: the data set of the demo.

The notices are the rules of ScanCode's `licensedcode-data` 32.1.0 (PyPI, CC-BY-4.0, nexB Inc. and others) marked
`is_license_notice`, of 10 to 50 words, that name one licence, among the 20 commonest SPDX identifiers. A row is

    {"prompt": notice + "\\nSPDX: ", "completion": identifier}

Jaccard(a, b) = |words(a) & words(b)| / |words(a) | words(b)|; two notices with 0.7 or more are near-duplicates. The
test set is drawn first, at random among all notices but never two near-duplicates, so that its rows are independent and
a bootstrap over them means what it says; whatever is a near-duplicate of a test or validation notice is then left out
of training. Whole connected components would not do instead: near-duplicates chain (661 of the 2,803 notices hang
together, most of the GPL's among them), so a test of whole components would be a test without GPL boilerplate.

    python examples/spdx/task.py OUT        # writes OUT/train.jsonl, valid.jsonl, test.jsonl, statistics.json
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from smedjan.checkpoint.atomic import write_atomic, write_errors
from smedjan.errors import DataError, SmedjanError

PACKAGE, VERSION = "licensedcode-data", "32.1.0"
CREDIT = f"{PACKAGE} {VERSION}: ScanCode licence rules, nexB Inc. and others, CC-BY-4.0"
SUFFIX = "\nSPDX: "
NEAR = 0.7
"""Word-set Jaccard from which two notices count as near-duplicates."""
TRAIN, VALID, TEST = 1200, 60, 300


@dataclass(frozen=True, kw_only=True)
class Notice:
    """One rule: its file name, the text that people wrote, the SPDX identifier that ScanCode's reviewers gave it."""

    rule: str
    text: str
    spdx: str

    def row(self) -> dict[str, str]:
        return {"prompt": self.text + SUFFIX, "completion": self.spdx}


@dataclass(frozen=True, kw_only=True)
class Task:
    """The three sets, and how many rows each step of their making kept."""

    train: list[Notice]
    valid: list[Notice]
    test: list[Notice]
    statistics: dict[str, object]


def build(seed: int = 0) -> Task:
    """The same sets for the same seed, on every machine."""
    data = _data_folder()
    candidates, counts = _read_rules(data)
    order = list(candidates)
    random.Random(seed).shuffle(order)
    held_out, blocked = _draw_apart(order, TEST + VALID)
    pool = [notice for notice in order if notice.rule not in blocked]
    if len(pool) < TRAIN:
        raise DataError(f"{len(pool)} notices are left to train on, {TRAIN} wanted", file=data, remedy="use seed 0")
    test, valid, train = held_out[:TEST], held_out[TEST:], pool[:TRAIN]
    sets = {"train": train, "valid": valid, "test": test}
    statistics: dict[str, object] = {
        "source": CREDIT,
        "seed": seed,
        **counts,
        "left_out_as_near_duplicates": len(blocked) - len(held_out),
        "trainable": len(pool),
        "rows": {name: len(rows) for name, rows in sets.items()},
        "words_per_notice": {name: _quartiles([len(n.text.split()) for n in rows]) for name, rows in sets.items()},
        "notices_with_an_spdx_tag": {name: sum("SPDX" in n.text for n in rows) for name, rows in sets.items()},
        "notices_with_their_identifier_verbatim": {
            name: sum(n.spdx in n.text for n in rows) for name, rows in sets.items()
        },
        "identifiers": {
            name: dict(sorted(Counter(n.spdx for n in rows).items(), key=lambda kv: (-kv[1], kv[0])))
            for name, rows in sets.items()
        },
    }
    return Task(train=train, valid=valid, test=test, statistics=statistics)


def write(task: Task, out: Path) -> None:
    """One JSON Lines file a set, and `statistics.json`. Each appears whole or not at all."""
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for name, notices in (("train", task.train), ("valid", task.valid), ("test", task.test)):
        write_atomic(out / f"{name}.jsonl", "".join(json.dumps(n.row()) + "\n" for n in notices).encode())
    write_atomic(out / "statistics.json", (json.dumps(task.statistics, indent=2) + "\n").encode())


def words(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """The word sets by which nearness is judged: runs of letters and digits, and what white space separates.

    A pair is near if either says so. `SPDX:` counts as a word of every notice: that only makes the rule stricter, and
    it then holds for whole prompts too.
    """
    prompt = (text + SUFFIX).lower()
    return frozenset(re.findall(r"\w+", prompt)), frozenset(prompt.split())


def near(a: tuple[frozenset[str], frozenset[str]], b: tuple[frozenset[str], frozenset[str]]) -> bool:
    for x, y in zip(a, b, strict=True):
        shared = len(x & y)
        if shared >= NEAR * (len(x) + len(y) - shared):
            return True
    return False


def _draw_apart(order: list[Notice], n: int) -> tuple[list[Notice], set[str]]:
    """The first `n` of `order` that are near none before them, and the rules that may not be trained on."""
    bags = {notice.rule: words(notice.text) for notice in order}
    drawn: list[Notice] = []
    blocked: set[str] = set()
    for notice in order:
        if len(drawn) == n:
            break
        if notice.rule in blocked:
            continue
        drawn.append(notice)
        blocked.update(rule for rule, bag in bags.items() if near(bags[notice.rule], bag))
    return drawn, blocked


def _data_folder() -> Path:
    remedy = f"pip install {PACKAGE}=={VERSION}"
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise DataError(f"{PACKAGE} is not installed", remedy=remedy) from error
    if package.version != VERSION:
        raise DataError(f"{PACKAGE} {package.version} is installed, its rules differ", remedy=remedy)
    return Path(str(package.locate_file("licensedcode/data")))


def _read_rules(data: Path) -> tuple[list[Notice], dict[str, int]]:
    """Every notice that fits the task, in the order of its file name, and the counts on the way there."""
    spdx_of = _spdx_identifiers(data / "licenses")
    counts: Counter[str] = Counter()
    found: list[Notice] = []
    for path in sorted((data / "rules").glob("*.RULE")):
        fields, text = _front_matter(path)
        counts["rules"] += 1
        if fields.get("is_license_notice") != "yes" or fields.get("is_deprecated") == "yes":
            continue
        counts["notices"] += 1
        # `{{...}}` marks the phrase that ScanCode requires: a reviewer's mark beside the answer, not the author's text.
        text = text.replace("{{", "").replace("}}", "").strip()
        spdx = spdx_of.get(fields.get("license_expression", ""))
        if spdx is None or not 10 <= len(text.split()) <= 50:
            continue
        counts["notices_of_one_licence_and_10_to_50_words"] += 1
        found.append(Notice(rule=path.name, text=text, spdx=spdx))
    kept = {spdx for spdx, _ in sorted(Counter(n.spdx for n in found).items(), key=lambda kv: (-kv[1], kv[0]))[:20]}
    found = [notice for notice in found if notice.spdx in kept]
    counts["of_the_20_commonest_identifiers"] = len(found)
    by_words: dict[str, list[Notice]] = {}
    for notice in found:
        by_words.setdefault(" ".join(re.findall(r"\w+", notice.text.lower())), []).append(notice)
    # The same words under two identifiers have no right answer.
    unique = [same[0] for same in by_words.values() if len({notice.spdx for notice in same}) == 1]
    counts["without_repeats_and_contradictions"] = len(unique)
    return unique, dict(counts)


def _spdx_identifiers(folder: Path) -> dict[str, str]:
    """ScanCode key -> SPDX identifier, for the licences SPDX lists (`LicenseRef-scancode-*` is ScanCode's own name)."""
    found = {}
    for path in folder.glob("*.LICENSE"):
        fields, _ = _front_matter(path)
        spdx = fields.get("spdx_license_key", "LicenseRef-")
        if not spdx.startswith("LicenseRef-"):
            found[fields["key"]] = spdx
    return found


def _front_matter(path: Path) -> tuple[dict[str, str], str]:
    """The top-level scalars of the YAML between two `---` lines, and the text after it."""
    parts = re.fullmatch(r"---\n(.*?)^---\n?(.*)", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if parts is None:
        raise DataError("no YAML front matter", file=path, remedy=f"pip install --force-reinstall {PACKAGE}=={VERSION}")
    pairs = re.findall(r"^(\w+):[ \t]*(.*?)[ \t]*$", parts[1], re.MULTILINE)
    return {key: value.strip("'\"") for key, value in pairs}, parts[2]


def _quartiles(values: list[int]) -> list[int]:
    ordered = sorted(values)
    return [ordered[round(q * (len(ordered) - 1))] for q in (0.0, 0.25, 0.5, 0.75, 1.0)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write train.jsonl, valid.jsonl and test.jsonl into")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        task = build(arguments.seed)
        write(task, arguments.out)
    except SmedjanError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(task.statistics, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
