"""A tensor in parts is the tensor, and what was passed of a mapped file is no longer in memory."""

import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest

from smedjan.checkpoint import raw as raws
from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor, parts_of


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (7,), (8,), (3, 5), (2, 8)])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int8, np.bool_])
def test_parts_joined_are_the_tensor(
    shape: tuple[int, ...], kind: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Scalars, empty tensors and last parts of every length; lazily, and from parts that are made on the way."""
    monkeypatch.setattr(raws, "PART", 4)
    tensor = RawTensor.of(np.random.default_rng(0).random(shape).astype(kind))
    parts = list(tensor.parts())
    assert [part.numel for part in parts] == [4] * (tensor.numel // 4) + [tensor.numel % 4] * (tensor.numel % 4 > 0)
    lazy = LazyTensor(spec=tensor.spec, load=lambda: tensor, file=tmp_path)
    made = LazyTensor.of_parts(tensor.spec, tmp_path, lazy.parts)
    for tensors in ({"x": tensor}, LazyTensors({"x": lazy}), LazyTensors({"x": made})):
        joined = RawTensor.joined(tensor.spec, parts_of(tensors, "x"))
        assert joined.data.tobytes() == tensor.data.tobytes() == tensors["x"].data.tobytes()
        assert joined.spec == tensor.spec == tensors["x"].spec


def resident_bytes(address: int) -> int:
    """What this process has in memory of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(hex(address))


def test_passed_pages_of_a_mapped_file_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(os.urandom(32 << 20))
    with (tmp_path / "data").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensor = RawTensor(dtype="float32", shape=(8 << 20,), data=memoryview(mapped))
    address = np.frombuffer(tensor.data, np.uint8).__array_interface__["data"][0]
    total = 0
    for part in tensor.parts():
        total += int(np.frombuffer(part.data, np.uint8).sum(dtype=np.int64))
        assert part.nbytes <= resident_bytes(address) <= part.nbytes + (1 << 20)
    assert resident_bytes(address) == 0
    assert total == int(np.frombuffer(tensor.data, np.uint8).sum(dtype=np.int64))
    assert resident_bytes(address) == 32 << 20
