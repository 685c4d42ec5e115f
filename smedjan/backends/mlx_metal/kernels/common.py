"""What every Metal kernel shares: how it is launched, where it may run, and sums over a threadgroup.

A kernel is the body of a function in the Metal Shading Language; `mx.fast.metal_kernel` writes the signature around it,
from the names and dtypes of its arrays, and compiles it where it first runs. Each has a twin in `mx` ops, the rule of
the same name in the module beside this package, which runs where there is no Metal and gives the same numbers but for
the order of sums.

Widths are read from the arrays' shapes, as in MLX's own row kernels: a pipeline is compiled for a dtype and a few
flags, never for a length of rows. A thread reads runs of RUN neighbours, and the next run starts where the last
thread's ended, so that a simdgroup's reads are one piece of memory. They are scalar reads: views may start at any
element, where a vector type would need its own alignment. Everything is computed in float32 and rounded once.

No kernel uses atomics: an order of sums is fixed by the shape alone, and two runs are equal to the bit.

Limits are Apple's for GPU families Apple7 (M1) to Apple9 (M3, M4) ("Metal Feature Set Tables"): 1024 threads and 32 KB
of memory a threadgroup, 31 buffers. How many threads a pipeline may really have falls with its registers: a thread's
128 words allow 384 of 208 KB (dougallj, philipturner: measured), so that kernels which hold a row ask for few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

SIMD = 32
"""Threads of a simdgroup, on every Apple GPU."""

RUN = 4
"""Neighbouring values that a thread reads at once, as in MLX's own row kernels."""

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """`groups` threadgroups of `threads` threads each; what they are given and what they make."""

    inputs: tuple[mx.array, ...]
    template: tuple[tuple[str, Any], ...]
    groups: Triple
    threads: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]

    @property
    def grid(self) -> Triple:
        """In threads, as Metal's dispatchThreads has it: whole threadgroups."""
        return self.groups[0] * self.threads, self.groups[1], self.groups[2]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """`source` is a function's body over arrays of these names; `header` is put before it. An input that is no
    `contiguous` array of rows is copied to be one, or is read by its strides."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str = ""
    contiguous: bool = True

    @cached_property
    def built(self) -> Any:
        """Made once: a function that `mx.compile` traces must find the same one again."""
        return mx.fast.metal_kernel(
            name=self.name,
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=self.source,
            header=self.header,
            ensure_row_contiguous=self.contiguous,
        )

    def __call__(
        self,
        *inputs: mx.array,
        groups: Triple,
        threads: int,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[mx.Dtype],
        **template: mx.Dtype | int | bool,
    ) -> list[mx.array]:
        launch = Launch(
            inputs=inputs,
            template=tuple(template.items()),
            groups=groups,
            threads=threads,
            shapes=tuple(shapes),
            dtypes=tuple(dtypes),
        )
        return DEVICE.run(self, launch)


class Device:
    """Where kernels run: the one place that decides between a kernel and its twin."""

    def has_metal(self) -> bool:
        return mx.metal.is_available()

    def run(self, kernel: Kernel, launch: Launch) -> list[mx.array]:
        return kernel.built(
            inputs=list(launch.inputs),
            template=list(launch.template) or None,
            grid=launch.grid,
            threadgroup=(launch.threads, 1, 1),
            output_shapes=list(launch.shapes),
            output_dtypes=list(launch.dtypes),
        )


DEVICE = Device()
"""Tests put another in its place: one that runs a kernel's source on the CPU."""


def has_metal(node: Any = None) -> bool:
    """`supports=` of a rule that is a kernel."""
    return DEVICE.has_metal()


def threads_for(width: int, most: int, run: int = RUN) -> int:
    """Threads of a threadgroup that shares a row of `width`, a run each: whole simdgroups, at most `most` threads."""
    return min(most, ceil_div(ceil_div(width, run), SIMD) * SIMD)


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def scalars(*values: float) -> mx.array:
    """Numbers that a kernel reads from the constant address space: of fewer than 8, MLX passes a copy."""
    assert len(values) < 8, f"{len(values)} scalars would be an array in device memory"
    return mx.array(values, dtype=mx.float32)


def run_of(width: str, body: str) -> str:
    """Metal: `body` for i of the RUN columns from `start` on that are below `width`. A whole run has no branch between
    its reads, which are then in flight together; both loops are of RUN turns, so that arrays stay in registers."""
    return f"""
      if (start + RUN <= {width}) {{
        for (int i = 0; i < RUN; i++) {{{body}}}
      }} else {{
        for (int i = 0; i < RUN; i++) {{
          if (start + i < {width}) {{{body}}}
        }}
      }}
"""


REDUCE = """
static constant constexpr const int SIMD = 32;
static constant constexpr const int RUN = 4;

// The sum of `value` over a threadgroup, in every thread. `parts` [SIMD] is free again behind the next barrier.
inline float group_sum(float value, threadgroup float* parts, uint lane, uint simdgroup, uint simdgroups) {
  value = metal::simd_sum(value);
  if (lane == 0) {
    parts[simdgroup] = value;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  return metal::simd_sum(lane < simdgroups ? parts[lane] : 0.0f);
}
"""
