"""RawTensor: bytes with a dtype and a shape, the only form in which arrays cross between backends.

numpy has no bfloat16, so nothing here goes through numpy: a backend wraps `data` in its own array type in `from_raw`
and gives its bytes back in `to_raw`. Little-endian, C order. LazyTensors is a set of them that is read on demand.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

ITEMSIZE: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "uint64": 8,
    "int32": 4,
    "uint32": 4,
    "int16": 2,
    "uint16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes an element, by dtype name (the names torch and numpy use)."""

PART = 1 << 20
"""Elements of a tensor that are in memory at once while it is copied."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor without its bytes."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """`data` holds prod(shape) elements of `dtype`. It may be a view of a mapped file: never write to it."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def __post_init__(self) -> None:
        assert self.dtype in ITEMSIZE, f"unknown dtype {self.dtype!r}"
        assert self.data.nbytes == self.nbytes, f"{self.data.nbytes} bytes for {self.dtype}{list(self.shape)}"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(dtype=self.dtype, shape=self.shape)

    @classmethod
    def of(cls, array: object, dtype: str | None = None) -> RawTensor:
        """From anything with the buffer protocol and a C-contiguous layout (numpy, array.array, bytes with a dtype).

        `dtype` renames the elements, which must have its size: uint16 bit patterns become bfloat16.
        """
        view = memoryview(array)  # type: ignore[arg-type]
        shape = tuple(view.shape or ())
        name = dtype or _FORMATS[view.format]
        assert view.itemsize == ITEMSIZE[name], f"elements of {view.itemsize} bytes as {name}"
        # An empty view cannot be cast.
        return cls(dtype=name, shape=shape, data=view.cast("B") if view.ndim and view.nbytes else view)

    @classmethod
    def joined(cls, spec: TensorSpec, parts: Iterable[RawTensor]) -> RawTensor:
        """The tensor of which `parts` are consecutive elements."""
        return cls(dtype=spec.dtype, shape=spec.shape, data=memoryview(b"".join(part.data for part in parts)))

    def drop_pages(self) -> None:
        """What was read of a mapped file leaves memory."""
        _drop_pages(self.data)

    def parts(self) -> Iterator[RawTensor]:
        """The elements in order, PART at a time, as flat views. What was passed of a mapped file leaves memory."""
        size = PART * ITEMSIZE[self.dtype]
        data = self.data.cast("B") if self.nbytes else self.data
        for start in range(0, self.nbytes, size):
            part = data[start : start + size]
            yield RawTensor(dtype=self.dtype, shape=(part.nbytes // ITEMSIZE[self.dtype],), data=part)
            _drop_pages(part)


def _drop_pages(data: memoryview) -> None:
    """Mapped pages count as this process's memory until they are dropped; touched again, they are mapped again."""
    mapped = data.obj
    # Windows has no madvise: its working set is trimmed by the system.
    if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that `load` reads when asked; `file` is where it comes from, `name` what it is called there if that is
    another name than here: both for messages.

    `stream` gives it as consecutive flat parts where making the whole at once would be a waste.
    """

    spec: TensorSpec
    load: Callable[[], RawTensor]
    file: Path
    stream: Callable[[], Iterator[RawTensor]] | None = None
    name: str | None = None

    @classmethod
    def of_parts(cls, spec: TensorSpec, file: Path, stream: Callable[[], Iterator[RawTensor]]) -> LazyTensor:
        """A tensor that is made part by part."""
        return cls(spec=spec, file=file, load=lambda: RawTensor.joined(spec, stream()), stream=stream)

    def parts(self) -> Iterator[RawTensor]:
        return self.load().parts() if self.stream is None else self.stream()


class LazyTensors(Mapping[str, RawTensor]):
    """Tensors whose dtypes and shapes are known before their bytes, which are read (and dropped) one at a time."""

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> RawTensor:
        entry = self.entries[name]
        tensor = entry.load()
        assert tensor.spec == entry.spec, f"{name}: {tensor.spec} is not {entry.spec}"
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def specs_of(tensors: Mapping[str, RawTensor]) -> dict[str, TensorSpec]:
    """The spec of each tensor, without reading lazy ones."""
    if isinstance(tensors, LazyTensors):
        return {name: entry.spec for name, entry in tensors.entries.items()}
    return {name: tensor.spec for name, tensor in tensors.items()}


def parts_of(tensors: Mapping[str, RawTensor], name: str) -> Iterator[RawTensor]:
    """One tensor as consecutive flat parts, lazy ones read as they are asked for."""
    return tensors.entries[name].parts() if isinstance(tensors, LazyTensors) else tensors[name].parts()


_FORMATS = {
    "d": "float64",
    "f": "float32",
    "e": "float16",
    "q": "int64",
    "l": "int64",
    "Q": "uint64",
    "L": "uint64",
    "i": "int32",
    "I": "uint32",
    "h": "int16",
    "H": "uint16",
    "b": "int8",
    "B": "uint8",
    "?": "bool",
}
