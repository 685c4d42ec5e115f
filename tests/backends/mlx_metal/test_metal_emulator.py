"""What the emulator of Metal kernels finds out: each kernel here is wrong in one way, and may run on a GPU."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_emulator import Emulator, MetalError

from smedjan.backends.mlx_metal.kernels.common import REDUCE, Kernel, Launch

THREADS = 64


def run(
    source: str, *, header: str = "", x: mx.array | None = None, threads: int = THREADS, order: int = 1
) -> mx.array:
    """A kernel x -> y float32 [threads], of one threadgroup."""
    kernel = Kernel(name="wrong", inputs=("x",), outputs=("y",), source=source, header=header)
    launch = Launch(
        inputs=(mx.arange(threads, dtype=mx.float32) if x is None else x,),
        template=(),
        groups=(1, 1, 1),
        threads=threads,
        shapes=((threads,),),
        dtypes=(mx.float32,),
    )
    return Emulator(order=order).run(kernel, launch)[0]


LID = "const uint i = thread_position_in_threadgroup.x;\n"
BARRIER = "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\n"
NEIGHBOUR = LID + "threadgroup float held[64];\nheld[i] = x[i];\n{}y[i] = held[63 - i];\n"
SUM = (
    LID
    + "threadgroup float parts[SIMD];\n"
    + "y[i] = group_sum(x[i], parts, thread_index_in_simdgroup, simdgroup_index_in_threadgroup, "
    + "simdgroups_per_threadgroup);\n"
)


def test_a_right_kernel_runs_in_every_order():
    for order in range(4):
        assert run(NEIGHBOUR.format(BARRIER), order=order).tolist() == list(range(63, -1, -1))
        assert run(SUM, header=REDUCE, order=order).tolist() == [64 * 63 / 2] * 64


WRONG = {
    "a missing barrier": (NEIGHBOUR.format(""), "race|before it is written"),
    "a barrier for other memory": (NEIGHBOUR.format(BARRIER.replace("threadgroup)", "device)")), "race|before it is"),
    "memory that nobody wrote": (LID + "threadgroup float held[64];\n" + BARRIER + "y[i] = held[i];", "before it is"),
    "one element written by two threads": (LID + "y[i / 2] = x[i];", r"race: y\[\d+\] is written"),
    "an output read by another thread": (LID + "y[i] = x[i];\nif (i == 5) { y[5] = y[6]; }", r"race|never"),
    "a write behind the end": (LID + "y[i + 1] = x[i];", r"y\[64\] is outside its 64 elements"),
    "a write before the beginning": (LID + "y[int(i) - 1] = x[i];", r"y\[-1\] is outside"),
    "a read behind the end": (LID + "y[i] = x[i * 2];", r"x\[\d+\] is outside"),
    "an index outside threadgroup memory": (LID + "threadgroup float held[32];\nheld[i] = 1.0f;\ny[i] = x[i];", "held"),
    "an output left out": (LID + "if (i != 7) { y[i] = x[i]; }", r"y\[7\] is never written"),
    "a barrier that half the threads pass": (LID + f"if (i < 32) {{ {BARRIER} }}\ny[i] = x[i];", "do not get there"),
    "a simdgroup's sum in half of its threads": (LID + "y[i] = i % 2 ? metal::simd_sum(x[i]) : 0.0f;", "do not get"),
    "too much threadgroup memory": (LID + "threadgroup float held[8193];\nheld[i] = x[i];\ny[i] = held[i];", "32772"),
    "a number of 64 bits": (LID + "y[i] = x[i] * 0.5;", "number without f"),
    "a double": (LID + "y[i] = double(x[i]);", "'double' in a kernel"),
    "an atomic sum": (LID + "atomic_float z;\ny[i] = x[i];", "'atomic_float' in a kernel"),
    "a type that no kernel has": (LID + "y[i] = x[i] + lost;", "was not declared"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found_out(name):
    source, message = WRONG[name]
    with pytest.raises(MetalError, match=message):
        run(source)


def test_arithmetic_of_narrow_dtypes_is_not_left_to_the_compiler():
    with pytest.raises(MetalError, match=r"no match for .operator\*"):
        run(LID + "y[i] = x[i] * x[i];", x=mx.ones(THREADS, dtype=mx.bfloat16))


def test_a_short_array_lies_in_another_address_space():
    """MLX passes fewer than eight elements in `constant`, where a `device` pointer does not reach."""
    header = "inline float first(const device float* x) { return x[0]; }\n"
    source = LID + "y[i] = first(x);"
    assert run(source, header=header).tolist() == [0.0] * THREADS
    with pytest.raises(MetalError, match=r"could not convert|cannot convert|no matching"):
        run(source, header=header, x=mx.ones(3))


@pytest.mark.parametrize("threads", [48, 1056])
def test_threads_are_whole_simdgroups(threads):
    with pytest.raises(MetalError, match=f"{threads} threads a threadgroup"):
        run(LID + "y[i] = x[i];", threads=threads)
