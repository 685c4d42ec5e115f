"""safetensors files, read strictly and written byte for byte as the `safetensors` library writes them.

A file is: header length N, u64 little-endian · N bytes of JSON, {name: {dtype, shape, data_offsets: [begin, end]}} and
perhaps `__metadata__`, padded with spaces to 8 bytes · the data, which the offsets (bytes from the end of the header)
cover without hole or overlap. We read the header ourselves so that a lying one is named to the byte and the data stay
views of the mapped file.

A model directory holds one `model.safetensors`, or shards and `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath, PureWindowsPath
from reprlib import repr as short
from typing import Any, BinaryIO

from smedjan.checkpoint.atomic import write_atomic
from smedjan.checkpoint.digest import Go, started
from smedjan.checkpoint.raw import ITEMSIZE, LazyTensor, LazyTensors, RawTensor, TensorSpec, parts_of, specs_of
from smedjan.errors import CheckpointError
from smedjan.models.config import parse_json, read_json_object

# In the library's order: it writes wider dtypes first.
_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
_DTYPES = {code: name for name, code in _NAMES.items()}
_RANK = {name: rank for rank, name in enumerate(_NAMES)}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# Bytes, on every file system in use.
_MAX_NAME = 255
_MAX_HEADER = 100_000_000
# numpy's limit; torch has the same.
_MAX_DIMS = 64
_AGAIN = "download or save the file again"


def _entry(name: str, info: Any, file: Path) -> tuple[TensorSpec, int, int]:
    """One header entry, checked in itself."""

    def bad(message: str, remedy: str = _AGAIN) -> CheckpointError:
        return CheckpointError(message, file=file, field=name, remedy=remedy)

    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise bad("the header entry must have exactly dtype, shape and data_offsets")
    code, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise bad(f"dtype {short(code)} is not supported", f"supported: {', '.join(_DTYPES)}")

    def naturals(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)

    if not naturals(shape) or len(shape) > _MAX_DIMS:
        raise bad(f"shape {short(shape)} is not a list of at most {_MAX_DIMS} whole numbers")
    if not naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {short(offsets)} is not [begin, end]")
    spec = TensorSpec(dtype=_DTYPES[code], shape=tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise bad(f"{code}{shape} takes {spec.nbytes} bytes, data_offsets span {offsets[1] - offsets[0]}")
    return spec, offsets[0], offsets[1]


def _header(file: Path, raw: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header and where the data begin."""

    def bad(message: str) -> CheckpointError:
        return CheckpointError(message, file=file, field="header", remedy=_AGAIN)

    if size < 8:
        raise bad(f"the file has {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(raw.read(8), "little")
    if length > _MAX_HEADER or 8 + length > size:
        raise bad(f"the header claims {length} bytes in a file of {size}: truncated, or not a safetensors file")
    text = raw.read(length)
    if text[:1] != b"{":
        raise bad("the header is not a JSON object")
    try:
        # json guesses UTF-16 from zero bytes; the format is UTF-8.
        header = parse_json(text.decode("utf-8"), file, CheckpointError, field="header")
    except UnicodeDecodeError as cause:
        raise bad("the header is not UTF-8") from cause
    # MLX writes null where there is none, which the format's own library reads.
    metadata = header.get("__metadata__")
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError("must map strings to strings", file=file, field="__metadata__", remedy=_AGAIN)
    return header, 8 + length


def _check_layout(entries: Mapping[str, tuple[TensorSpec, int, int]], file: Path, data_bytes: int) -> None:
    """The tensors cover the data exactly once."""
    reached = 0
    for name, (_, begin, end) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else f"leaves a hole of {begin - reached} bytes"
            raise CheckpointError(
                f"begins at byte {begin} and {what}, which ends at {reached}", file=file, field=name, remedy=_AGAIN
            )
        if end > data_bytes:
            raise CheckpointError(
                f"ends at byte {end} of {data_bytes}: the file is truncated, or its header lies",
                file=file,
                field=name,
                remedy=_AGAIN,
            )
        reached = end
    if reached != data_bytes:
        raise CheckpointError(
            f"{data_bytes - reached} bytes at the end belong to no tensor", file=file, field="header", remedy=_AGAIN
        )


def _view(mapped: memoryview, spec: TensorSpec, begin: int, end: int) -> RawTensor:
    data = mapped[begin:end]
    if begin % ITEMSIZE[spec.dtype]:
        # An old writer that did not pad its header: arrays over odd addresses are slow, or refused.
        data = memoryview(bytes(data))
    return RawTensor(dtype=spec.dtype, shape=spec.shape, data=data)


def open_file(file: Path) -> LazyTensors:
    """The tensors of one file, in the order of their data, as read-only views of its mapping."""
    try:
        with file.open("rb") as raw:
            size = raw.seek(0, 2)
            raw.seek(0)
            header, start = _header(file, raw, size)
            mapped = memoryview(mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as cause:
        raise CheckpointError(f"cannot be read: {cause.strerror}", file=file, remedy="check the path") from cause
    entries = {name: _entry(name, info, file) for name, info in header.items() if name != "__metadata__"}
    _check_layout(entries, file, size - start)
    ordered = sorted(entries.items(), key=lambda item: item[1][1:])
    return LazyTensors(
        {
            name: LazyTensor(spec=spec, load=partial(_view, mapped, spec, start + begin, start + end), file=file)
            for name, (spec, begin, end) in ordered
        }
    )


def read_metadata(file: Path) -> dict[str, str]:
    """The `__metadata__` of one file."""
    with file.open("rb") as raw:
        header, _ = _header(file, raw, file.stat().st_size)
    return header.get("__metadata__") or {}


def _header_of(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    """What a file of these tensors begins with, and the order in which their data follow."""
    order = sorted(specs, key=lambda name: (-_RANK[specs[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict({"format": "pt"} if metadata is None else metadata)}
    reached = 0
    for name in order:
        spec = specs[name]
        span = [reached, reached + spec.nbytes]
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        reached = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def begins_like(file: Path, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether `file` has the very header that save_file gives these tensors: with equal data, an equal file."""
    text, _ = _header_of(specs, None)
    if file.stat().st_size != len(text) + sum(spec.nbytes for spec in specs.values()):
        return False
    with file.open("rb") as raw:
        return raw.read(len(text)) == text


def save_file(
    path: Path,
    tensors: Mapping[str, RawTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    go: Go = lambda: None,
) -> str:
    """Write `tensors` atomically and give the file's sha256. Readers in HF's world want format = pt.

    Lazy tensors are read part by part: while a part is in the cache it is hashed and written, and its page-out begun.
    """
    text, order = _header_of(specs_of(tensors), metadata)
    digest = sha256(text)

    def write(file: BinaryIO) -> None:
        file.write(text)
        for name in order:
            for part in parts_of(tensors, name):
                go()
                digest.update(part.data)
                file.write(part.data)
                _start_writing_back(file, part.nbytes)

    write_atomic(path, write)
    return digest.hexdigest()


def _start_writing_back(file: BinaryIO, last: int) -> None:
    """Have the kernel write the `last` bytes now, not at the fsync: the disk works while the next part is hashed."""
    if hasattr(os, "posix_fadvise"):
        file.flush()
        os.posix_fadvise(file.fileno(), file.tell() - last, last, os.POSIX_FADV_DONTNEED)


def open_checkpoint(directory: Path) -> LazyTensors:
    """The weights in a model directory, mapped and read on demand."""
    single, index = directory / SINGLE, directory / INDEX
    # mlx-lm writes an index of a single file too.
    if single.is_file() and index.is_file() and set(read_weight_map(index).values()) != {SINGLE}:
        raise CheckpointError(
            f"both {SINGLE} and {INDEX} are there", file=directory, remedy="remove the one that is out of date"
        )
    if single.is_file() and not index.is_file():
        return open_file(single)
    if index.is_file():
        return open_shards(directory, index)
    if not directory.is_dir():
        raise CheckpointError("there is no such directory", file=directory, remedy="check the path")
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if shards:
        raise CheckpointError(
            f"is missing, though {shards[0]} is there", file=index, remedy="download the index as well"
        )
    pickled = sorted(path for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            "pickled weights can run code when read, so smedjan refuses them",
            file=pickled[0],
            remedy="convert them where you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)",
        )
    raise CheckpointError(f"no weights here, neither {SINGLE} nor {INDEX}", file=directory, remedy="check the path")


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, of an index whose shards all lie beside it."""
    weight_map = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "must map tensor names to files", file=index, field="weight_map", remedy="download the index again"
        )
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and "\0" not in shard
        plain = plain and len(shard.encode()) <= _MAX_NAME
        # Windows reads more separators, and drives; an index must mean the same file on every machine.
        if not plain or PurePosixPath(shard).name != shard or PureWindowsPath(shard).name != shard:
            raise CheckpointError(
                f"the shard of {name} is {short(shard)}, not the name of a file in this folder",
                file=index,
                field="weight_map",
                remedy="get the model from a source you trust",
            )
    return weight_map


def open_shards(directory: Path, index: Path) -> LazyTensors:
    """The tensors of the shards that an index beside them names."""
    weight_map = read_weight_map(index)
    shards: dict[str, LazyTensors] = {}
    for tensor, name in weight_map.items():
        if name in shards:
            continue
        if not (directory / name).is_file():
            raise CheckpointError("the shard is missing", file=directory / name, field=tensor, remedy="download it")
        shards[name] = open_file(directory / name)
    for name, tensors in shards.items():
        for tensor in tensors:
            if weight_map.get(tensor) != name:
                raise CheckpointError(
                    f"the index puts this tensor in {weight_map.get(tensor)!r}",
                    file=directory / name,
                    field=tensor,
                    remedy="download the index and the shards again, from one revision",
                )
    entries: dict[str, LazyTensor] = {}
    for tensor, name in weight_map.items():
        if tensor not in shards[name].entries:
            raise CheckpointError(
                "the index names this tensor, the shard does not hold it",
                file=directory / name,
                field=tensor,
                remedy="download the index and the shards again, from one revision",
            )
        entries[tensor] = shards[name].entries[tensor]
    return LazyTensors(entries)


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> tensors: in order, a new shard where the next tensor would not fit (huggingface_hub's rule)."""
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, spec in specs.items():
        if spec.nbytes > max_shard_bytes:
            shards.append([name])
            continue
        if current and size + spec.nbytes > max_shard_bytes:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += spec.nbytes
    if current or not shards:
        shards.append(current)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def save_sharded(
    directory: Path, tensors: Mapping[str, RawTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, str]:
    """Write the weights into an existing directory, the index last, and drop weights there that it does not name.

    Several shards are written at a time. Gives the sha256 of each file by its name.
    """
    specs = specs_of(tensors)
    plan = plan_shards(specs, max_shard_bytes)

    def save(file: str, go: Go) -> str:
        return save_file(directory / file, _subset(tensors, plan[file]), go=go)

    with started([partial(save, file) for file in plan]) as digests:
        written = dict(zip(plan, digests(), strict=True))
    if len(plan) > 1:
        index: dict[str, Any] = {
            "metadata": {
                "total_parameters": sum(spec.numel for spec in specs.values()),
                "total_size": sum(spec.nbytes for spec in specs.values()),
            },
            "weight_map": {name: file for file, names in plan.items() for name in names},
        }
        content = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        write_atomic(directory / INDEX, content)
        written[INDEX] = sha256(content).hexdigest()
    for old in [directory / INDEX, *directory.glob("model*.safetensors")]:
        if old.name not in written:
            old.unlink(missing_ok=True)
    return written


def _subset(tensors: Mapping[str, RawTensor], names: list[str]) -> Mapping[str, RawTensor]:
    if isinstance(tensors, LazyTensors):
        return LazyTensors({name: tensors.entries[name] for name in names})
    return {name: tensors[name] for name in names}
