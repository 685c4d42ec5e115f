"""What a backend is: a rule table, array conversion, and which of the two pipelines its programs go through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from smedjan.backends.collective import Collective
from smedjan.backends.host_memory import available_bytes
from smedjan.checkpoint.raw import RawTensor
from smedjan.errors import ConfigError, Elsewhere
from smedjan.graph.lowering import RuleTable
from smedjan.graph.node import Graph
from smedjan.graph.program import Program

Array = Any


@dataclass(frozen=True, kw_only=True)
class Forms:
    """How many forms the micro-batches of a run have: `lengths` of padded rows, and `rows`, numbers of trained ones at
    each length."""

    lengths: int
    rows: int


class Backend(ABC):
    """`exact` backends decompose before they differentiate and give transformers' bits; fast ones keep fused ops."""

    name: str
    exact: bool
    rules: RuleTable
    device: str = "cpu"
    recomputes: bool = False
    """Whether a step gives up what it would keep for `--train.memory` alone, and not for what the device has."""

    @abstractmethod
    def from_raw(self, raw: RawTensor) -> Array:
        """An array with the bytes of `raw`; never a view of them."""

    @abstractmethod
    def to_raw(self, array: Array) -> RawTensor:
        """The array's bytes, on the host. Waits for the device."""

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array: ...

    @abstractmethod
    def synchronize(self, arrays: Mapping[str, Array]) -> None:
        """Returns when the arrays are computed: for timing and for a bounded queue."""

    def scalar(self, value: float) -> Any:
        """A host scalar as lowerings expect it (learning rate, step, cache position)."""
        return value

    def pool(self, memory: int | None = None, reserved: int = 0) -> Any:
        """Memory that the programs of one session share, for backends that plan it: of `memory` bytes (None: all that
        the device has) what is left beside `reserved` ones (an optimizer's state)."""
        return None

    def batch(self, raw: RawTensor) -> Array:
        """An array that a program reads once: tokens, labels, a count."""
        return self.from_raw(raw)

    def fuse(self, graph: Graph) -> Graph:
        """A forward graph with the ops that the backend has in place of the smaller ones that they are made of."""
        return graph

    def program(self, graph: Graph, pool: Any = None) -> Program:
        """Lowers a finished graph; a backend may fuse it once more and return a compiled subclass."""
        return Program(graph, self.rules)

    def smallest(self, graph: Graph, pool: Any = None) -> Program:
        """The program of `graph` that needs least memory where `program`'s would not fit: to be planned, not run."""
        return self.program(graph, pool)

    def collective(self, *, rank: int, world: int) -> Collective:
        """The `world` processes of a data-parallel run, of which this is number `rank`."""
        if rank > 0:
            raise Elsewhere(f"{self.name} trains in one process")
        raise ConfigError(
            f"{self.name} trains in one process, and WORLD_SIZE is {world}",
            field="backend",
            remedy="start smedjan itself, without torchrun or accelerate launch",
        )

    def fp8_measure(self, *, field: str) -> Callable[[Array, Array], float]:
        """(x, W) -> |fp8_linear(x, W) - x W^T| / |x W^T|: what products of 8-bit floats cost a layer.

        A backend or device that has none raises ConfigError for `field`, which asked for them.
        """
        raise ConfigError(
            f"{self.name} has no products of 8-bit floats",
            field=field,
            remedy="give --backend cuda_triton, or leave it out",
        )

    @property
    def timed(self) -> bool:
        """Whether what a call takes here says what a run's will take."""
        return True

    def w8a8_measure(self, *, field: str) -> Callable[[Array, Array, Array, Array], float]:
        """(x, W, codes, scale) -> |w8a8_linear(x, W) - x W^T| / |x W^T|: what products of 8-bit integers cost a layer.

        A backend that has none raises ConfigError for `field`, which asked for them.
        """
        raise ConfigError(
            f"{self.name} has no products of 8-bit integers",
            field=field,
            remedy="give --backend cpu_native, or leave it out",
        )

    def peak_flops(self, dtype: str) -> float | None:
        """FLOP/s that this machine's matrix products of `dtype` reach, measured once in a process; None: unknown."""
        from smedjan.backends.peak import matmul_flops  # it draws with numpy, which a backend does without

        if dtype not in self._peaks:
            self._peaks[dtype] = matmul_flops(self, dtype)
        return self._peaks[dtype]

    @cached_property
    def _peaks(self) -> dict[str, float]:
        return {}

    def library_bytes(self, program: Program, forms: Forms) -> int:
        """What the libraries that compute take of a process besides arrays, in a run whose micro-batches, of which
        `program` is one, have so many forms: code that they make, buffers, threads."""
        return 0

    def memory_available(self) -> int | None:
        """Bytes that a run may take of the device from now on; None: unknown."""
        return available_bytes()

    def holding(self, planned: int, *, remedy: str) -> AbstractContextManager[None]:
        """While a run of so many planned bytes lasts: what the device is told of them, and taken back behind it. A run
        that the device cannot hold is a BackendError with this remedy."""
        return nullcontext()

    def peak_memory(self) -> int:
        """Peak resident or device bytes since `reset_peak_memory`, or of the process where that cannot be reset."""
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere

    def reset_peak_memory(self) -> None:
        """Starts the peak anew. Linux alone can for resident memory (proc(5), clear_refs)."""
        refs = Path("/proc/self/clear_refs")
        if refs.exists():
            refs.write_text("5")

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that compute."""
        return {}
