"""What is written is what the `gguf` package writes, to the byte, and is there whole or not at all."""

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from smedjan.checkpoint import gguf_write
from smedjan.checkpoint.gguf_file import read_gguf
from smedjan.checkpoint.gguf_quantize import ENCODERS, encode
from smedjan.checkpoint.gguf_write import MetadataValue, OutTensor, gguf_size, write_gguf
from smedjan.checkpoint.raw import RawTensor
from smedjan.errors import CheckpointError

METADATA: dict[str, MetadataValue] = {
    "general.architecture": "llama",
    "a.int": 7,
    "a.float": 1e-5,
    "a.true": True,
    "a.uint64": np.uint64(1 << 40),
    "a.int8": np.int8(-3),
    "a.int64": np.int64(-(1 << 40)),
    "a.float64": np.float64(0.1),
    "a.text": "naïve ▁ 🙂\0end",
    "a.empty": "",
    "a.texts": ["x", "", "ÿ", "▁the"],
    "a.kinds": np.array([1, 3, -6], np.int32),
    "a.scores": np.array([0.5, -1e9], np.float32),
    "a.flags": np.array([True, False]),
    "a.bytes": np.arange(5, dtype=np.uint8),
}


def values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def tensor(name: str, kind: str, shape: tuple[int, ...]) -> OutTensor:
    def chunks() -> Iterator[np.ndarray]:
        return encode(RawTensor.of(values(shape)), kind, name=name)

    return OutTensor(name=name, quantization=kind, shape=shape, chunks=chunks)


def everything() -> list[OutTensor]:
    """Each type, rows and vectors whose bytes are no multiple of the alignment, all ranks."""
    each = [tensor(f"t.{kind}", kind, (3, 256)) for kind in ENCODERS]
    return [*each, tensor("vector", "F32", (5,)), tensor("cube", "F16", (2, 3, 7)), tensor("four", "F32", (1, 2, 3, 1))]


def by_the_package(path: Path) -> Path:
    """The same file, by `gguf.GGUFWriter`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.int", 7)
    writer.add_float32("a.float", 1e-5)
    writer.add_bool("a.true", True)
    writer.add_uint64("a.uint64", 1 << 40)
    writer.add_int8("a.int8", -3)
    writer.add_int64("a.int64", -(1 << 40))
    writer.add_float64("a.float64", 0.1)
    writer.add_string("a.text", "naïve ▁ 🙂\0end")
    # Its add_string leaves an empty one out.
    writer.add_key_value("a.empty", "", gguf.GGUFValueType.STRING)
    writer.add_array("a.texts", ["x", "", "ÿ", "▁the"])
    writer.add_array("a.kinds", [1, 3, -6])
    writer.add_array("a.scores", [0.5, -1e9])
    writer.add_array("a.flags", [True, False])
    writer.add_array("a.bytes", bytes(range(5)))
    for each in everything():
        data = np.concatenate(list(each.chunks()))
        if each.quantization in ("F32", "F16"):
            stored = data.view(np.float32 if each.quantization == "F32" else np.float16)
            writer.add_tensor(each.name, stored.reshape(each.shape))
        else:
            rows = data.reshape(*each.shape[:-1], -1)
            writer.add_tensor(each.name, rows, raw_dtype=GGMLQuantizationType[each.quantization])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_file_is_the_gguf_package_s_to_the_byte(tmp_path: Path) -> None:
    write_gguf(tmp_path / "ours.gguf", METADATA, everything())
    written = (tmp_path / "ours.gguf").read_bytes()
    assert written == by_the_package(tmp_path / "theirs.gguf").read_bytes()
    assert len(written) == gguf_size(METADATA, everything())


def test_both_readers_find_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, METADATA, everything())
    theirs = gguf.GGUFReader(path)
    found = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert found == read_gguf(path).metadata
    for name, value in METADATA.items():
        expected = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        assert found[name] == pytest.approx(expected) if isinstance(value, float) else found[name] == expected
    ours = read_gguf(path).tensors
    for each, read in zip(everything(), theirs.tensors, strict=True):
        data = np.concatenate(list(each.chunks()))
        assert (read.name, read.tensor_type.name) == (each.name, each.quantization)
        assert read.data.tobytes() == bytes(ours[each.name].data) == data.tobytes()
        assert ours[each.name].shape == each.shape == tuple(reversed(read.shape.tolist()))


def test_one_tensor_is_made_at_a_time_and_in_order(tmp_path: Path) -> None:
    events: list[str] = []

    def traced(name: str) -> OutTensor:
        def chunks() -> Iterator[np.ndarray]:
            events.append(f"{name} begins")
            yield np.zeros(4, np.uint8)
            yield np.zeros(4, np.uint8)
            events.append(f"{name} ends")

        return OutTensor(name=name, quantization="F32", shape=(2,), chunks=chunks)

    write_gguf(tmp_path / "a.gguf", {}, [traced("a"), traced("b")])
    assert events == ["a begins", "a ends", "b begins", "b ends"]


@pytest.mark.parametrize(
    "fail",
    [lambda: (_ for _ in ()).throw(CheckpointError("is not finite")), lambda: (_ for _ in ()).throw(MemoryError())],
    ids=["refused", "out of memory"],
)
def test_a_failure_leaves_what_was_there(fail: Callable[[], Iterator[np.ndarray]], tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    broken = OutTensor(name="b", quantization="F32", shape=(2,), chunks=fail)
    with pytest.raises((CheckpointError, MemoryError)):
        write_gguf(path, METADATA, [tensor("a", "F32", (2,)), broken])
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]


def test_a_directory_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_gguf(tmp_path / "missing" / "a.gguf", METADATA, [])


def wrong_size() -> OutTensor:
    return OutTensor(name="a", quantization="F32", shape=(2,), chunks=lambda: [np.zeros(4, np.uint8)])


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({"a": -1}, []),
        ({"a": 1 << 32}, []),
        ({"a": [1, 2]}, []),
        ({"a": np.zeros((2, 2), np.float32)}, []),
        ({}, [tensor("x" * 64, "F32", (2,))]),
        ({}, [tensor("a", "F32", (1, 1, 1, 1, 2))]),
        ({}, [tensor("a", "F32", (2,)), tensor("a", "F32", (3,))]),
        ({}, [wrong_size()]),
    ],
    ids=["negative", "wide", "numbers", "matrix", "long name", "rank", "twice", "short"],
)
def test_what_no_reader_would_take_is_a_defect_of_the_caller(
    metadata: dict, tensors: list[OutTensor], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        gguf_write.write_gguf(tmp_path / "a.gguf", metadata, tensors)
    assert not list(tmp_path.iterdir())
