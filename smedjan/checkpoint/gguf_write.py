"""Writing a GGUF file, version 3, little-endian: the header first, then one tensor after another, as they come.

The layout is that of `gguf_file`. A metadata value has the GGUF type of its Python type: bool, int (uint32), float
(float32), str, a list of str; numpy scalars and 1-d arrays say other types: np.uint64(7), np.array(kinds, np.int32).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from gguf import GGMLQuantizationType

from smedjan.checkpoint.atomic import write_atomic
from smedjan.checkpoint.gguf_quantize import encoded_size

MetadataValue: TypeAlias = "bool | int | float | str | np.generic | np.ndarray | list[str]"

# numpy kind and size -> GGUF value type.
_TYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MAX_NAME = 63
"""Bytes: ggml keeps 64, with a final zero."""


@dataclass(frozen=True, kw_only=True)
class OutTensor:
    """One tensor to write: `shape` outermost first, `chunks()` gives its bytes in order when its turn comes."""

    name: str
    quantization: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return encoded_size(self.shape, self.quantization)


def gguf_size(metadata: Mapping[str, MetadataValue], tensors: Sequence[OutTensor]) -> int:
    """The bytes of the file, before anything is encoded."""
    return len(_header(metadata, tensors)) + sum(_aligned(tensor.nbytes) for tensor in tensors)


def write_gguf(path: Path, metadata: Mapping[str, MetadataValue], tensors: Sequence[OutTensor]) -> None:
    """Write `path`, whole or not at all, in the given order; one tensor is encoded at a time."""

    def content(file: BinaryIO) -> None:
        file.write(_header(metadata, tensors))
        for tensor in tensors:
            written = 0
            for chunk in tensor.chunks():
                assert chunk.dtype == np.uint8, chunk.dtype
                written += file.write(chunk.data)
            assert written == tensor.nbytes, f"{tensor.name}: {written} bytes of {tensor.nbytes}"
            file.write(bytes(_aligned(written) - written))

    write_atomic(path, content)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _header(metadata: Mapping[str, MetadataValue], tensors: Sequence[OutTensor]) -> bytes:
    assert len({tensor.name for tensor in tensors}) == len(tensors), "a tensor stands there twice"
    out = BytesIO()
    out.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out.write(_text(key) + _value(value, key))
    offset = 0
    for tensor in tensors:
        name = _text(tensor.name)
        assert len(name) - 8 <= _MAX_NAME, f"{tensor.name} is too long a name"
        assert 1 <= len(tensor.shape) <= 4, tensor.shape
        kind = GGMLQuantizationType[tensor.quantization]
        dimensions = tuple(reversed(tensor.shape))
        out.write(name + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, int(kind), offset))
        offset += _aligned(tensor.nbytes)
    out.write(bytes(_aligned(out.tell()) - out.tell()))
    return out.getvalue()


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: MetadataValue, key: str) -> bytes:
    """The type and the value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        assert all(isinstance(text, str) for text in value), f"{key}: lists hold strings, arrays numbers"
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    # np.float64 is a float, too: what numpy made keeps its type.
    if isinstance(value, np.generic | np.ndarray):
        typed = value
    elif isinstance(value, bool):
        typed = np.bool_(value)
    elif isinstance(value, int):
        assert 0 <= value < 1 << 32, f"{key}: {value} is no uint32"
        typed = np.uint32(value)
    else:
        typed = np.float32(value)
    kind = _TYPES[typed.dtype.str[1:]]
    raw = np.asarray(typed, typed.dtype.newbyteorder("<")).tobytes()
    if isinstance(typed, np.ndarray):
        assert typed.ndim == 1, f"{key}: arrays have one dimension"
        return struct.pack("<IIQ", _ARRAY, kind, typed.size) + raw
    return struct.pack("<I", kind) + raw
