"""Tapes as Python writes them down: `src/tape.h`'s steps over the addresses of torch arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor as Array

from smedjan.backends.cpu_native import native
from smedjan.backends.torch_reference.elementwise import DTYPES, NAMES
from smedjan.graph.node import Graph
from smedjan.graph.op import OPS

ARRAYS, NUMBERS, REALS = 16, 12, 4


class Step(ctypes.Structure):
    """`struct step` of src/tape.h."""

    _fields_ = (
        ("run", ctypes.c_void_p),
        ("array", ctypes.c_void_p * ARRAYS),
        ("number", ctypes.c_int64 * NUMBERS),
        ("real", ctypes.c_float * REALS),
    )


@cache
def _player() -> Callable[[int, int, int], None]:
    function = native.library().smedjan_run
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    function.restype = None
    return function


@cache
def _address(kernel: str) -> int:
    found = ctypes.cast(getattr(native.library(), kernel), ctypes.c_void_p).value
    assert found is not None
    return found


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    """Every buffer that kernels write to; the tests put a poisoned one in its place."""
    return torch.empty(shape, dtype=dtype)


class Tape:
    """Steps in order. `sealed` lays them out in memory for `play`, which runs a stretch of them."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._held: list[Array] = []
        self._memory: Any = None
        self._start = 0

    def add(
        self,
        kernel: str,
        arrays: Sequence[Array | None],
        numbers: Sequence[int] = (),
        reals: Sequence[float] = (),
    ) -> None:
        """A kernel of src/ by its name, with what its comment lists. Arrays are contiguous and kept alive."""
        assert len(arrays) <= ARRAYS, kernel
        assert len(numbers) <= NUMBERS, kernel
        assert len(reals) <= REALS, kernel
        assert all(array is None or array.is_contiguous() for array in arrays), kernel
        self._held += [array for array in arrays if array is not None]
        self.steps.append(
            Step(
                _address(kernel),
                (ctypes.c_void_p * ARRAYS)(*(None if array is None else array.data_ptr() for array in arrays)),
                (ctypes.c_int64 * NUMBERS)(*numbers),
                (ctypes.c_float * REALS)(*reals),
            )
        )

    def scratch(self, shape: tuple[int, ...]) -> Array:
        """float32 that nothing outside the step reads."""
        return allocate(shape, torch.float32)

    def seal(self) -> None:
        self._memory = (Step * len(self.steps))(*self.steps)
        self._start = ctypes.addressof(self._memory)

    def play(self, first: int, last: int) -> None:
        """Steps first to last - 1, by as many threads as torch has."""
        _player()(self._start + first * ctypes.sizeof(Step), last - first, torch.get_num_threads())


def dtype_of(array: Array) -> str:
    """The suffix of kernels for arrays like this one."""
    return NAMES[array.dtype]


def run_now(op_name: str, write: Callable[..., None], *ins: Any, **attrs: Any) -> Any:
    """One op at once; its shape rule says what the results are."""
    graph = Graph()
    arrays = [value if value is None or isinstance(value, Array) else torch.tensor(value) for value in ins]
    inputs = [
        None if array is None else graph.input(str(index), tuple(array.shape), NAMES[array.dtype])
        for index, array in enumerate(arrays)
    ]
    OPS[op_name](*inputs, **attrs)
    node = graph.nodes[-1]
    updated = dict(node.op.donated(node))
    outs = [
        arrays[updated[index]] if index in updated else allocate(tensor.shape, DTYPES[tensor.dtype])
        for index, tensor in enumerate(node.outputs)
    ]
    tape = Tape()
    write(tape, tuple(None if array is None else array.contiguous() for array in arrays), tuple(outs), **node.attrs)
    tape.seal()
    tape.play(0, len(tape.steps))
    return outs[0] if len(outs) == 1 else tuple(outs)
