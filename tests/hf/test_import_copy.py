"""How an import copies: whole or not at all, in shards of the size asked for, in memory that does not grow."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smedjan.checkpoint.safetensors import open_checkpoint, open_file
from smedjan.hf.import_model import import_model
from tests.hf.importing import load, refused, sha256_of

Make = Callable[..., Any]
WEIGHTS = "model.safetensors"


def test_an_existing_destination_is_refused_before_any_work(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    shutil.copytree(source, tmp_path / "out")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir())
    assert "not empty" in str(refused(source, tmp_path / "out"))
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_full_disk_leaves_nothing(
    at: int, model_directory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills at the 1st, 2nd, 4th file: one line that names the destination, nothing half-written."""
    source = model_directory()
    left, real = [at], os.fsync

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    error = refused(source, tmp_path / "out")
    assert "the disk is full" in str(error)
    assert error.file is not None
    assert error.file.startswith(str(tmp_path / "out"))


def test_ctrl_c_leaves_nothing(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()

    def progress(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_model(source, tmp_path / "out", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


INTERRUPTED = """
import os, signal, sys, threading
from smedjan.hf.import_model import import_model
here = []
def progress(done, total):
    if not here and done > total // 2:
        here.append(done)
        os.kill(os.getpid(), signal.SIGINT)
try:
    import_model(sys.argv[1], sys.argv[2], max_shard_size="1MB", progress=progress)
except KeyboardInterrupt:
    print(threading.active_count())
"""


def test_an_interrupt_from_outside_stops_every_thread(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory(hidden_size=256, intermediate_size=4096, num_hidden_layers=8)
    words = [sys.executable, "-c", INTERRUPTED, str(source), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_progress_counts_every_byte(model_directory: Make, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    import_model(model_directory(), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) == len(open_checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("stored", ["50KB", "1GB"])
@pytest.mark.parametrize("size", ["50KB", 50_000, "70kb", "1.5 GB"])
def test_shards_are_of_the_size_asked_for(
    stored: str, size: str | int, tiny_model: Make, model_directory: Make, tmp_path: Path
) -> None:
    """From shards and from one file, to shards of the same size, of another and to one file: the same model.

    The hashes are those of the files: also where one pass serves two files because they are the same bytes.
    """
    source, model = model_directory(), tiny_model()
    (source / WEIGHTS).unlink()
    model.save_pretrained(source, max_shard_size=stored)
    report = import_model(source, tmp_path / "out", max_shard_size=size)
    limit = 50_000 if size in ("50KB", 50_000) else 70_000
    shards = list((tmp_path / "out").glob("model*.safetensors"))
    assert (len(shards) > 1) == (size != "1.5 GB")
    for shard in shards:
        held = open_file(shard)
        assert len(held) == 1 or sum(entry.spec.nbytes for entry in held.entries.values()) <= limit or len(shards) == 1
    same_plan = (stored, size) in {("50KB", "50KB"), ("50KB", 50_000), ("1GB", "1.5 GB")}
    assert same_plan == ({sha256_of(file) for file in source.glob("*.safetensors")} == {*map(sha256_of, shards)})
    for folder, files in ((source, report.sources), (tmp_path / "out", report.files)):
        assert {file["path"]: file["sha256"] for file in files} == {
            path.name: sha256_of(path) for path in folder.iterdir()
        }
    again = load(tmp_path / "out")
    assert all(torch.equal(left, right) for left, right in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("size", ["big", "0", "-5GB", "", "5PB", "1e9"])
def test_a_size_that_is_none_is_one_line(size: str, model_directory: Make, tmp_path: Path) -> None:
    error = refused(model_directory(), tmp_path / "out", max_shard_size=size)
    assert str(error).startswith(f"max_shard_size: is {size!r}; give a size such as 5GB")


def test_what_does_not_fit_on_the_disk_is_not_begun(
    model_directory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000))
    error = refused(model_directory(), tmp_path / "out")
    assert error.file == str(tmp_path / "out")
    assert "the model takes 401 KB, the disk has 300 KB free; free 101 KB" in str(error)
    import_model(tmp_path / "source", tmp_path / "out", dtype="bfloat16")


MEMORY = """
import resource, sys
from smedjan.hf.import_model import import_model
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_model(sys.argv[1], sys.argv[2], dtype=sys.argv[3], max_shard_size=sys.argv[4])
assert not {"torch", "transformers", "mlx", "triton"} & set(sys.modules)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", "5GB"), ("float32", "30MB")])
def test_memory_does_not_grow_with_the_model(dtype: str, size: str, model_directory: Make, tmp_path: Path) -> None:
    """160 MB, half of it in two tensors, take less than one of those: copied or widened, in one file or many.

    Mapped pages of the source count, as they do for whoever watches the process. No framework is imported.
    """
    shape = {"vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
    source = model_directory(dtype=torch.bfloat16, **shape)
    words = [str(source), str(tmp_path / "out"), dtype, size]
    done = subprocess.run([sys.executable, "-c", MEMORY, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    mapped = (source / WEIGHTS).stat().st_size
    assert mapped > 150e6
    assert int(done.stdout) * 1024 < mapped / 4
