"""Damaged files beside the weights, files that are something else, links in a circle, rights that are missing."""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from smedjan.errors import SmedjanError
from smedjan.hf.import_model import import_model
from tests.families import CASES
from tests.hf.damage import WEIGHTS, Damage, check, make_source, put, put_json

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "no UTF-8": b'{"a": "\xff"}',
    "half a surrogate": b'{"a": "\\ud800"}',
    "a key twice": b'{"eos_token_id": 1, "eos_token_id": 2}',
    "zeros": bytes(64),
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}
"""What no JSON object is."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("sound") / "source", "llama", CASES["llama"]["plain"])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_object(name: str, source: Path, tmp_path: Path) -> None:
    check(source, [_replaced(name, what, text) for what, text in TEXTS.items()], tmp_path / "scratch")


def _replaced(name: str, what: str, text: bytes) -> Damage:
    return Damage(
        what=f"{name}: {what}", file=name, names=(), apply=lambda folder: put(folder / name, text), refused=True
    )


def _edited(name: str, key: str, value: object, *, names: tuple[str, ...] | None = None) -> Damage:
    def apply(directory: Path) -> None:
        inner = content = json.loads((directory / name).read_text())
        *above, last = key.split(".")
        for each in above:
            inner = inner[each]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        put_json(directory / name, content)

    named = (last_of(key),) if names is None else names
    return Damage(what=f"{name}: {key} = {value!r}"[:120], file=name, names=named, apply=apply, refused=True)


def last_of(key: str) -> str:
    return key.rpartition(".")[2]


def test_generation_config_that_cannot_be(source: Path, tmp_path: Path) -> None:
    """What ends a text decides what is generated: ids that are none are refused, not passed on."""
    ids: list[object] = ["2", 2.0, -1, True, {}, [2, "3"], [2, -1], [[2]], 10**30]
    damages = [_edited("generation_config.json", "eos_token_id", value) for value in ids]
    check(source, damages, tmp_path / "scratch")


def test_tokenizer_that_cannot_be(source: Path, tmp_path: Path) -> None:
    wrong: dict[str, list[object]] = {
        "model": [..., None, [], "BPE"],
        "model.type": ["BPE2", 7],
        "model.vocab": [..., [], "x", {"a": -1}, {"a": "1"}, {"a": 1.5}],
        "model.unk_token": [..., 7],
        "pre_tokenizer": ["x", {"type": "Nothing"}],
        "normalizer": [{"type": "Nothing"}, 7],
        "post_processor": [{"type": "Nothing"}],
        "decoder": [{"type": "Nothing"}],
        "added_tokens": ["x", [{}], [{"id": "1"}]],
    }
    damages = [_edited("tokenizer.json", key, value, names=()) for key, values in wrong.items() for value in values]
    check(source, damages, tmp_path / "scratch")


def test_tokenizer_config_that_cannot_be(source: Path, tmp_path: Path) -> None:
    wrong: dict[str, list[object]] = {
        "eos_token": ["<nowhere>", 7, [], {"content": 7}],
        "bos_token": ["<nowhere>", 7, []],
        "pad_token": ["<nowhere>", 7, []],
    }
    damages = [_edited("tokenizer_config.json", key, value) for key, values in wrong.items() for value in values]
    check(source, damages, tmp_path / "scratch")


def _as_directory(name: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return apply


def _as_link(name: str, target: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to(target)

    return apply


def _as_pipe(name: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return apply


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_file_that_is_something_else(name: str, source: Path, tmp_path: Path) -> None:
    """A folder, a pipe (which must not be waited for), a link to itself, to nothing, to a device."""
    kinds = {
        "a folder": _as_directory(name),
        "a pipe": _as_pipe(name),
        "a link to itself": _as_link(name, name),
        "a link to nothing": _as_link(name, "nothing"),
        "a link to its folder": _as_link(name, "."),
        "a link to a device": _as_link(name, "/dev/zero"),
    }
    file = name if name == "config.json" else ""
    damages = [
        Damage(what=f"{name} is {what}", file=file, names=(), apply=apply, refused=True)
        for what, apply in kinds.items()
    ]
    check(source, damages, tmp_path / "scratch")


@pytest.mark.parametrize("where", ["source", "out", "above out"])
def test_a_folder_that_is_a_link_to_itself(where: str, source: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    given = {"source": (loop, tmp_path / "out"), "out": (source, loop), "above out": (source, loop / "out")}[where]
    with pytest.raises(SmedjanError) as caught:
        import_model(*given)
    assert str(loop) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def overrides_file_modes(allowed: bool) -> None:
    """Linux's capset(2) for this thread, and those that it starts: whether root passes over the modes of files."""
    bits = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, 32 capabilities each, twice
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    sets[0] = sets[0] | sets[1] & bits if allowed else sets[0] & ~bits
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


@contextmanager
def without_privileges() -> Iterator[Path]:
    """A new folder, and file modes that bind whoever runs the tests: root passes over them else."""
    with tempfile.TemporaryDirectory() as made:
        root = os.geteuid() == 0
        if root:
            overrides_file_modes(False)
        try:
            yield Path(made)
        finally:
            if root:
                overrides_file_modes(True)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, 0o000) for name in ("config.json", WEIGHTS, "tokenizer.json", "generation_config.json", "LICENSE")),
        *((".", mode) for mode in (0o000, 0o400, 0o100, 0o200)),
    ],
)
def test_what_may_not_be_read(name: str, mode: int, source: Path, tmp_path: Path) -> None:
    """Without rights to a file, or to the folder: one line that names it, though others could be read."""
    import_model(source, tmp_path / "warm")
    files = {file.name: file.read_bytes() for file in source.iterdir()} | {"LICENSE": b"as is"}
    with without_privileges() as folder:
        copy = folder / "copy"
        copy.mkdir()
        for each, content in files.items():
            (copy / each).write_bytes(content)
        (copy / name).chmod(mode)
        try:
            with pytest.raises(SmedjanError) as caught:
                import_model(copy, folder / "out")
            assert caught.value.file == str(copy / name)
            assert "cannot be read" in str(caught.value)
            assert [path.name for path in folder.iterdir()] == ["copy"]
        finally:
            (copy / name).chmod(0o700)


@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_where_nothing_may_be_written(mode: int, source: Path, tmp_path: Path) -> None:
    import_model(source, tmp_path / "warm")
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    with without_privileges() as folder:
        copy, closed = folder / "copy", folder / "closed"
        for made in (copy, closed):
            made.mkdir()
        for each, content in files.items():
            (copy / each).write_bytes(content)
        closed.chmod(mode)
        with pytest.raises(SmedjanError) as caught:
            import_model(copy, closed / "out")
        assert str(closed) in str(caught.value)
        closed.chmod(0o700)
        assert list(closed.iterdir()) == []
