"""Arrays in huge pages hold the bytes that they were made of, apart from each other and from where they came."""

from __future__ import annotations

import gc

import pytest
import torch

from smedjan.backends.cpu_native.native import memory
from smedjan.backends.cpu_native.native.memory import Chunks
from smedjan.runtime.select import backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_arrays_are_copies_apart(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CHUNK", 1 << 20)
    monkeypatch.setattr(memory, "SMALL", 1 << 10)
    to_raw, chunks = backend("torch_reference").to_raw, Chunks()
    given = [(torch.randn(rows, 97) * 50).to(dtype) for rows in (33, 700, 11, 5000, 64, 2000)]
    made = [chunks.array(to_raw(array)) for array in given]
    del chunks
    gc.collect()
    for index, (array, copy) in enumerate(zip(given, made, strict=True)):
        assert copy is not None
        assert copy.dtype == dtype
        assert copy.is_contiguous()
        assert copy.data_ptr() % memory.ALIGN == 0
        assert torch.equal(copy, array)
        copy.zero_()
        assert all(torch.equal(*pair) for pair in zip(made[index + 1 :], given[index + 1 :], strict=True))
    assert all(array.any() for array in given)


def test_small_arrays_are_left_to_torch() -> None:
    assert Chunks().array(backend("torch_reference").to_raw(torch.zeros(8))) is None
