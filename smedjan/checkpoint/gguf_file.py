"""The container of a GGUF file (versions 2 and 3, little-endian): metadata and tensor table, read strictly.

magic `GGUF` · u32 version · u64 tensors · u64 keys · keys: string, u32 type, value · tensors: string, u32 dims, u64
each (innermost first), u32 type, u64 offset · padding to `general.alignment` · data. A string is u64 length and UTF-8.
The walk is ours since `gguf.GGUFReader` follows a lying length for ever; dequantizing is the `gguf` package's.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from smedjan.errors import CheckpointError

QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""The tensor types that are read."""

# GGUF value type -> struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_AGAIN = "download the file again"


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor: `shape` outermost first, `data` its blocks as they are stored."""

    name: str
    quantization: str
    shape: tuple[int, ...]
    data: memoryview

    def dequantize(self) -> np.ndarray:
        """The values, float32, of `shape`."""
        kind = GGMLQuantizationType[self.quantization]
        if self.quantization in ("F32", "F16"):
            stored = np.frombuffer(self.data, np.float32 if self.quantization == "F32" else np.float16)
            return stored.astype(np.float32).reshape(self.shape)
        rows = np.frombuffer(self.data, np.uint8).reshape(*self.shape[:-1], -1)
        return dequantize(rows, kind).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads forward in the mapped file; past its end is an error that says where."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    def bad(self, message: str, field: str | None = None, remedy: str = _AGAIN) -> CheckpointError:
        return CheckpointError(message, file=self.path, field=field, remedy=remedy)

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise self.bad(
                f"{size} bytes are claimed at byte {self.at} of {len(self.data)}: the file is truncated or damaged"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        form = struct.Struct("<" + code)
        return form.unpack(self.take(form.size))[0]

    def text(self) -> str:
        raw = bytes(self.take(self.scalar("Q")))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as cause:
            raise self.bad(f"a string at byte {self.at - len(raw)} is not UTF-8") from cause

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.bad(f"has the unknown value type {kind}", key)
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner == _STRING:
            # Each string takes 8 bytes at least: refuse a lying count before the loop believes it.
            if count > (len(self.data) - self.at) // 8:
                raise self.bad(f"claims {count} strings: the file is truncated or damaged", key)
            return [self.text() for _ in range(count)]
        if inner not in _SCALARS:
            raise self.bad(f"is an array of the unsupported value type {inner}", key)
        form = np.dtype(_SCALARS[inner]).newbyteorder("<")
        return np.frombuffer(self.take(count * form.itemsize), form).tolist()


def read_gguf(path: Path) -> GgufFile:
    """The metadata and the tensors, mapped."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start[:4] != b"GGUF":
                raise CheckpointError("is not a GGUF file", file=path, field="magic", remedy="check the path")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as cause:
        raise CheckpointError(f"cannot be read: {cause.strerror}", file=path, remedy="check the path") from cause
    cursor = _Cursor(path, data)
    cursor.take(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        what = "is big-endian" if int.from_bytes(start[4:8], "big") in (2, 3) else f"is GGUF version {version}"
        raise cursor.bad(what, "version", "convert the model again with a current llama.cpp, for a little-endian host")
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata:
            raise cursor.bad("the key stands there twice", key)
        metadata[key] = cursor.value(cursor.scalar("I"), key)
    table = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.bad(f"is {alignment!r}, not a power of two", "general.alignment")
    first = -(-cursor.at // alignment) * alignment
    return GgufFile(path=path, metadata=metadata, tensors=_place(cursor, table, first))


def _tensor_info(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    """(name, quantization, shape, offset, bytes)"""
    name, rank = cursor.text(), cursor.scalar("I")
    if not 1 <= rank <= 4:
        raise cursor.bad(f"has {rank} dimensions", name)
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(rank)]))
    code, offset = cursor.scalar("I"), cursor.scalar("Q")
    known = {int(kind): kind.name for kind in GGMLQuantizationType}
    quantization = known.get(code, f"type {code}")
    if quantization not in QUANTIZATIONS:
        raise cursor.bad(
            f"is stored as {quantization}", name, f"use a file quantized as one of {', '.join(QUANTIZATIONS)}"
        )
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(code)]
    if shape[-1] % block:
        raise cursor.bad(f"has rows of {shape[-1]}, {quantization} stores blocks of {block}", name)
    return name, quantization, shape, offset, prod(shape) // block * size


def _place(
    cursor: _Cursor, table: list[tuple[str, str, tuple[int, ...], int, int]], first: int
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    reached = 0
    for name, quantization, shape, offset, size in sorted(table, key=lambda row: row[3]):
        if name in tensors:
            raise cursor.bad("the tensor stands there twice", name)
        if offset < reached:
            raise cursor.bad(f"begins at byte {offset} inside the tensor before it, which ends at {reached}", name)
        reached = offset + size
        if first + reached > len(cursor.data):
            raise cursor.bad(f"ends {first + reached - len(cursor.data)} bytes beyond the file: truncated", name)
        data = cursor.data[first + offset : first + reached]
        tensors[name] = GgufTensor(name=name, quantization=quantization, shape=shape, data=data)
    return {name: tensors[name] for name, *_ in table}
