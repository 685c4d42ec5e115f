"""Runs the kernels: in Triton's interpreter on the CPU, or on a CUDA device where SMEDJAN_TEST_DEVICE=cuda says so.

The interpreter is chosen when triton and the kernels are imported, so that this file must be read before them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

DEVICE = os.environ.get("SMEDJAN_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    kernels = sys.modules.get("smedjan.backends.cuda_triton.kernels.common")
    assert kernels is None or kernels.INTERPRETED, "the Triton kernels were imported before TRITON_INTERPRET was set"
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.tolerances import UNIT_ROUNDOFF  # noqa: E402

GUARD = 64
"""Elements of no man's land on each side of an allocation."""

POISON = {torch.int64: -(2**62), torch.int32: -(2**30), torch.uint8: 171}
"""What fills a buffer that cannot hold NaN."""


@dataclass
class Allocations:
    """Every buffer that the code under test took from torch.empty: NaN before it is written, guarded on both sides."""

    buffers: list[tuple[Tensor, int]] = field(default_factory=list)

    def make(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: object) -> Tensor:
        count = prod(shape)
        poison = POISON.get(dtype, float("nan"))
        flat = torch.full((count + 2 * GUARD,), poison, dtype=dtype, device=device)  # type: ignore[call-overload]
        self.buffers.append((flat, count))
        return flat.as_strided(shape, strides, GUARD)

    def fresh(self, shape: tuple[int, ...], dtype: torch.dtype, device: object) -> Tensor:
        """In place of `apply.allocate`."""
        return self.make(tuple(shape), torch.empty(shape, device="meta").stride(), dtype, device)

    @property
    def sizes(self) -> list[int]:
        return [count for _, count in self.buffers]

    def check(self) -> None:
        for flat, count in self.buffers:
            for side in (flat[:GUARD], flat[GUARD + count :]):
                intact = side.isnan() if side.is_floating_point() else side == POISON[side.dtype]
                assert bool(intact.all()), f"a kernel wrote outside a buffer of {count} {flat.dtype}"


@pytest.fixture(autouse=True)
def allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocations]:
    """Poisons and guards what the launchers allocate: a value that a kernel forgets to write shows as NaN."""
    made = Allocations()
    module = importlib.import_module("smedjan.backends.planned.immediate")
    monkeypatch.setattr(module, "allocate", made.fresh)
    yield made
    made.check()


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def rand(device: str) -> Callable[..., Tensor]:
    """Normal numbers of a seed of their own: rand(*shape, dtype=..., scale=...)."""
    generator = torch.Generator().manual_seed(20261124)

    def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    return make


@pytest.fixture
def same() -> Callable[[Tensor | None, Tensor | None], None]:
    """same(a, b): one computation in two launches. In the interpreter the bits are equal; a device may fuse a multiply
    and an add, or order a sum, differently in two compilations: there, within 8 unit roundoffs of the largest value."""

    def check(value: Tensor | None, other: Tensor | None) -> None:
        assert value is not None
        assert other is not None
        if DEVICE == "cpu":
            assert torch.equal(value, other)
        else:
            largest = float(other.abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(value, other, rtol=0, atol=8 * UNIT_ROUNDOFF[other.dtype] * largest)

    return check


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """chunked(n): a head holds n rows of logits at once."""

    from smedjan.backends.cuda_triton.kernels import common

    def set_to(size: int) -> None:
        monkeypatch.setattr(common, "chunk_rows", lambda rows, *_, **__: min(rows, size))

    return set_to
