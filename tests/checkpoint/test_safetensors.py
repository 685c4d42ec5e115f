"""Our safetensors files are the library's byte for byte, and no file that it refuses is read by us."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError

from smedjan.checkpoint.raw import LazyTensors, RawTensor
from smedjan.checkpoint.safetensors import open_checkpoint, open_file, read_metadata, save_file, save_sharded
from smedjan.errors import CheckpointError

DTYPES = ["float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


def raw(tensor: torch.Tensor) -> RawTensor:
    data = memoryview(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return RawTensor(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), data=data)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"layer.{index}.{name}": torch.randint(0, 2, (3, index + 1), generator=generator).to(getattr(torch, name))
        for index, name in enumerate(DTYPES)
    }
    return {**made, "scalar": torch.tensor(1.5), "empty": torch.zeros(2, 0), 'näme"\\': torch.ones(1)}


def test_files_equal_the_library_s_byte_for_byte(tmp_path: Path) -> None:
    safetensors.torch.save_file(tensors(), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    save_file(tmp_path / "ours.safetensors", {name: raw(tensor) for name, tensor in tensors().items()})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert read_metadata(tmp_path / "ours.safetensors") == {"format": "pt"}


def test_each_reads_what_the_other_wrote(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors(), file)
    ours = open_file(file)
    assert {name: ours[name].spec for name in ours} == {name: raw(tensor).spec for name, tensor in tensors().items()}
    assert all(bytes(ours[name].data) == bytes(raw(tensor).data) for name, tensor in tensors().items())
    save_file(tmp_path / "b.safetensors", ours)
    again = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors().items())


def test_metadata_that_is_null_is_none(tmp_path: Path) -> None:
    """As MLX writes it where it was given none; the library reads it too."""
    file = tmp_path / "a.safetensors"
    mx.save_safetensors(str(file), {"x": mx.arange(4)})
    assert b'"__metadata__":null' in file.read_bytes()
    assert safetensors.torch.load_file(file)["x"].tolist() == [0, 1, 2, 3]
    assert list(open_file(file)) == ["x"]
    assert read_metadata(file) == {}


def test_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    """Nothing is copied, and what is handed out cannot be written to."""
    save_file(tmp_path / "a.safetensors", {"x": raw(torch.arange(8.0))})
    data = open_file(tmp_path / "a.safetensors")["x"].data
    assert data.readonly
    assert data.obj.__class__.__name__ == "mmap"


def test_data_over_odd_addresses_are_copied_to_even_ones(tmp_path: Path) -> None:
    """Old writers did not pad the header: the values are right and the address is aligned."""
    values = np.arange(4, dtype=np.float32)
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    header += b" " * ((1 - len(header)) % 4)
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    found = np.frombuffer(open_file(file)["x"].data, np.float32)
    assert found.flags.aligned
    assert found.tolist() == values.tolist()


def built(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[object], begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LYING: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "at least 8"),
    "seven bytes": (b"1234567", "at least 8"),
    "header beyond the file": (built({}, length=1000), "claims 1000 bytes"),
    "absurd header length": (built({}, length=1 << 63), "claims"),
    "not an object": (built([1]), "not a JSON object"),
    "not JSON": (built(b"{oops}"), "not valid JSON"),
    "not UTF-8": (built(b'{"\xff": 1}'), "not UTF-8"),
    "deep nesting": (built(b"{" + b'"a":{' * 100_000), "not valid JSON"),
    "duplicate tensor": (
        built(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"1234",
        ),
        "twice",
    ),
    "overlap": (built({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "overlaps"),
    "hole": (built({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "hole of 4 bytes"),
    "hole at the start": (built({"a": entry([1], 4, 8)}, bytes(8)), "hole of 4 bytes"),
    "beyond the file": (built({"a": entry([4], 0, 16)}, bytes(12)), "ends at byte 16 of 12"),
    "bytes of no tensor": (built({"a": entry([1], 0, 4)}, bytes(6)), "2 bytes at the end"),
    "shape against size": (built({"a": entry([3], 0, 8)}, bytes(8)), "takes 12 bytes"),
    "backwards offsets": (built({"a": entry([1], 8, 4)}, bytes(8)), "not [begin, end]"),
    "negative offset": (built({"a": entry([1], -4, 0)}, bytes(4)), "not [begin, end]"),
    "negative dimension": (built({"a": entry([-1], 0, 4)}, bytes(4)), "shape"),
    "float dimension": (built({"a": entry([1.0], 0, 4)}, bytes(4)), "shape"),
    "true dimension": (built({"a": entry([True], 0, 4)}, bytes(4)), "shape"),
    "overflowing shape": (built({"a": entry([1 << 62, 1 << 62], 0, 4)}, bytes(4)), "takes"),
    "unknown dtype": (built({"a": entry([1], 0, 4, "F33")}, bytes(4)), "dtype 'F33' is not supported"),
    "eight-bit float": (built({"a": entry([4], 0, 4, "F8_E4M3")}, bytes(4)), "not supported"),
    "missing key": (built({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "exactly"),
    "metadata that is no text": (built({"__metadata__": {"a": 1}}), "strings to strings"),
}


@pytest.mark.parametrize("case", LYING)
def test_a_lying_file_is_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    content, message = LYING[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message.replace("[", r"\[").replace("]", r"\]")) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(file)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_what_the_library_refuses_we_refuse(tmp_path: Path) -> None:
    """600 damaged files: one byte changed in the header or the file cut. Where both read, both read the same."""
    chance = random.Random(0)
    file = tmp_path / "a.safetensors"
    save_file(file, {"a": raw(torch.arange(3.0)), "b": raw(torch.ones(2, 2, dtype=torch.bfloat16))})
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(600):
        damaged = bytearray(whole)
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(whole)) :]
        else:
            damaged[chance.randrange(header)] = chance.choice(b'0123456789{}[]",:ab \x00\xff')
        file.write_bytes(damaged)
        try:
            theirs = safetensors.torch.load(bytes(damaged))
        except SafetensorError:
            refused += 1
            with pytest.raises(CheckpointError):
                open_file(file)
            continue
        except (KeyError, TypeError, ValueError):
            continue  # a dtype that the library knows and torch does not
        try:
            ours = open_file(file)
        except CheckpointError:
            continue  # stricter than the library is fine
        assert {name: bytes(ours[name].data) for name in ours} == {n: bytes(raw(t).data) for n, t in theirs.items()}
    assert refused > 200


def test_shards_and_index_are_transformers_own(tmp_path: Path) -> None:
    """The same tensors in the same files as huggingface_hub's rule, and an index that leads back to every tensor."""
    state = {f"w{i}": torch.randn(size) for i, size in enumerate([10, 30, 5, 100, 1, 39, 40, 2])}
    plan = split_torch_state_dict_into_shards(state, filename_pattern="model{suffix}.safetensors", max_shard_size=160)
    written = save_sharded(tmp_path, {name: raw(tensor) for name, tensor in state.items()}, max_shard_bytes=160)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == plan.tensor_to_filename
    assert index["metadata"]["total_size"] == plan.metadata["total_size"]
    assert set(written) == {*plan.filename_to_tensors, "model.safetensors.index.json"}
    assert all(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == written[name] for name in written)
    found = open_checkpoint(tmp_path)
    assert isinstance(found, LazyTensors)
    assert {name: bytes(found[name].data) for name in found} == {n: bytes(raw(t).data) for n, t in state.items()}


def test_saving_again_leaves_no_weights_of_the_model_before(tmp_path: Path) -> None:
    state = {name: raw(torch.ones(8)) for name in "abc"}
    save_sharded(tmp_path, state, max_shard_bytes=32)
    save_sharded(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    save_sharded(tmp_path, state, max_shard_bytes=64)
    assert len(open_checkpoint(tmp_path)) == 3


def sharded(folder: Path, change: Callable[[dict[str, str]], object]) -> Path:
    save_sharded(folder, {name: raw(torch.ones(8)) for name in "abc"}, max_shard_bytes=32)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", ".", "a\\b", "C:x", 3, None, "a\0b"],
)
def test_an_index_cannot_point_outside_its_folder(shard: object, tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save_file(tmp_path / "secret.safetensors", {"a": raw(torch.ones(8))})
    index = sharded(inside, lambda weight_map: weight_map.update(a=shard))
    with pytest.raises(CheckpointError, match="not the name of a file in this folder") as caught:
        open_checkpoint(inside)
    assert caught.value.file == str(index)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    """A shard that is gone, a tensor that is not there, one that the index does not name, two layouts at once."""
    for name in "pqrs":
        (tmp_path / name).mkdir()
    sharded(tmp_path / "p", lambda weight_map: weight_map.update(a="model-00009-of-00003.safetensors"))
    with pytest.raises(CheckpointError, match="shard is missing"):
        open_checkpoint(tmp_path / "p")
    sharded(tmp_path / "q", lambda weight_map: weight_map.update(d=weight_map["a"]))
    with pytest.raises(CheckpointError, match=r"d: .*does not hold it"):
        open_checkpoint(tmp_path / "q")
    sharded(tmp_path / "r", lambda weight_map: weight_map.update(a=weight_map["b"]))
    with pytest.raises(CheckpointError, match="the index"):
        open_checkpoint(tmp_path / "r")
    sharded(tmp_path / "s", lambda weight_map: None)
    save_file(tmp_path / "s" / "model.safetensors", {"a": raw(torch.ones(8))})
    with pytest.raises(CheckpointError, match="both"):
        open_checkpoint(tmp_path / "s")


def test_a_folder_without_weights_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights here"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"pickled weights can run code.*save_pretrained") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(tmp_path / "pytorch_model.bin")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="download the index"):
        open_checkpoint(tmp_path)
