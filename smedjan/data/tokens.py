"""Tokenised documents as a few long arrays, in memory or mapped from a file: five bytes a token, and no object a row.

N: documents, T: tokens of all of them. Document i is tokens [ends[i - 1], ends[i]) of them.

    input_ids    int32 [T]
    labels_mask  bool [T]     true where the token is trained
    ends         int64 [N]
    lines        int64 [N]    where it was read, in the unit of its file
    files        int32 [N]    which of the files that was
    truncated    bool [N]
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from smedjan.checkpoint.raw import RawTensor
from smedjan.data.example import Example
from smedjan.data.files import Source

ARRAYS = {
    "input_ids": "int32",
    "labels_mask": "bool",
    "ends": "int64",
    "lines": "int64",
    "files": "int32",
    "truncated": "bool",
}
_OF_TOKENS = ("input_ids", "labels_mask")


class Tokens(Sequence[Example]):
    """The documents, in file order; an Example is made when it is asked for, as views of the arrays.

    `first` is a Source of each file, of which only `line` differs from document to document.
    """

    def __init__(self, tensors: Mapping[str, RawTensor], first: Sequence[Source]) -> None:
        self.tensors, self.first = tensors, tuple(first)
        made = {name: np.frombuffer(tensors[name].data, dtype) for name, dtype in ARRAYS.items()}
        self.input_ids: NDArray[np.int32] = made["input_ids"]
        self.labels_mask: NDArray[np.bool_] = made["labels_mask"]
        self.ends: NDArray[np.int64] = made["ends"]
        self._lines, self._files, self._truncated = made["lines"], made["files"], made["truncated"]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Tokens:
        """A copy of the examples, in memory."""
        if isinstance(examples, Tokens):
            return examples
        writer = TokenWriter(lambda name: io.BytesIO())
        for example in examples:
            writer.append(example)
        return writer.tokens()

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        of = self.first[self._files[index]]
        return Example(
            input_ids=self.input_ids[start:end],
            labels_mask=self.labels_mask[start:end],
            source=Source(file=of.file, line=int(self._lines[index]), unit=of.unit),
            truncated=bool(self._truncated[index]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.ends, prepend=0)

    @cached_property
    def trained_tokens(self) -> int:
        """Predictions with a target, as `Example.trained_tokens` counts them."""
        first = self.labels_mask[self.ends - self.lengths]
        parts = (np.frombuffer(part.data, bool) for part in self.tensors["labels_mask"].parts())
        return sum(int(np.count_nonzero(part)) for part in parts) - int(np.count_nonzero(first))

    @cached_property
    def sha256(self) -> str:
        """Of the lengths, then all tokens, then all masks, as they lie there (little-endian)."""
        digest = sha256(self.lengths.astype("<i8").tobytes())
        for name in _OF_TOKENS:
            for part in self.tensors[name].parts():
                digest.update(part.data)
        return digest.hexdigest()


class TokenWriter:
    """Makes Tokens of examples that come one at a time. `open` gives the file of each array by its name."""

    def __init__(self, open: Callable[[str], BinaryIO]) -> None:
        self._open = {name: open(name) for name in ARRAYS}
        self._first: dict[Any, Source] = {}
        self._reached = 0

    def append(self, example: Example) -> None:
        of = example.source.file
        self._first.setdefault(of, example.source)
        self._reached += len(example)
        values = {
            "input_ids": example.input_ids,
            "labels_mask": example.labels_mask,
            "ends": self._reached,
            "lines": example.source.line,
            "files": list(self._first).index(of),
            "truncated": example.truncated,
        }
        for name, dtype in ARRAYS.items():
            self._open[name].write(np.asarray(values[name], dtype).tobytes())

    def tokens(self) -> Tokens:
        """What was appended; of files on disk, mapped."""
        return Tokens(
            {name: _mapped(file, ARRAYS[name]) for name, file in self._open.items()}, tuple(self._first.values())
        )


def _mapped(file: BinaryIO, dtype: str) -> RawTensor:
    if isinstance(file, io.BytesIO):
        data = file.getbuffer()
    else:
        file.flush()
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return RawTensor(dtype=dtype, shape=(data.nbytes // np.dtype(dtype).itemsize,), data=data)
