"""What rules of plans say that they allocate while they run is what torch allocates then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smedjan.backends.cpu_native import CpuNative, native
from smedjan.graph.node import Graph
from smedjan.graph.op import OPS
from smedjan.ops import optimizer, quantized  # noqa: F401  (declare the ops)

B, H, KV, T, D = 2, 6, 2, 512, 32
V, W, ROWS = 500, 96, 600
N, K = 96, 128

SCALARS = 4 * 64
"""Bytes of single numbers, which nobody plans; torch aligns them."""


def attention(dtype: str, *, backward: bool) -> tuple[str, list[Any], dict[str, Any]]:
    queries, keys = ((B, H, T, D), dtype), ((B, KV, T, D), dtype)
    ins = [queries, keys, keys, ((B, 1, T, T), "bool")]
    if backward:
        ins = [queries, *ins, queries, ((B, H, T), "float32")]
    attrs = {"causal": False, "scale": 0.2, "implementation": "sdpa", "cap": 0.0, "softmax_dtype": "float32"}
    return "attention_bwd" if backward else "attention", ins, attrs


def head(dtype: str, grads: str) -> tuple[str, list[Any], dict[str, Any]]:
    ins = [((ROWS, W), dtype), ((V, W), dtype), ((ROWS,), "int64"), ((), "float32")]
    attrs = {"grads": grads, "scaling": 1.0, "divisor": 1.0, "cap": 0.0, "z_loss": 0.0, "smoothing": 0.0}
    return "linear_cross_entropy", ins, attrs


def nf4(dtype: str) -> tuple[str, list[Any], dict[str, Any]]:
    blocks = N * K // 64
    ins = [((N * K // 2,), "uint8"), ((blocks,), "uint8"), ((-(-blocks // 256),), "float32"), ((), "float32")]
    return "nf4_dequantize", ins, {"shape": (N, K), "dtype": dtype}


def int8(dtype: str) -> tuple[str, list[Any], dict[str, Any]]:
    return "int8_dequantize", [((N, K), "int8"), ((N,), "float32")], {"dtype": dtype}


def adamw() -> tuple[str, list[Any], dict[str, Any]]:
    array, scalar = ((N, K), "float32"), ((), "float32")
    attrs = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    return "adamw_update", [array, array, array, array, scalar, ((), "int64"), scalar, None], attrs


def embedding_bwd() -> tuple[str, list[Any], dict[str, Any]]:
    ins = [((B, T, W), "bfloat16"), ((B, T), "int64")]
    return "embedding_bwd", ins, {"vocab_size": V, "padding_idx": None}


CASES = {
    "attention": attention("float32", backward=False),
    "attention, bfloat16": attention("bfloat16", backward=False),
    "attention_bwd": attention("float32", backward=True),
    "attention_bwd, bfloat16": attention("bfloat16", backward=True),
    "head": head("float32", "xw"),
    "head, bfloat16": head("bfloat16", "xw"),
    "nf4": nf4("float32"),
    "nf4, bfloat16": nf4("bfloat16"),
    "int8": int8("float32"),
    "int8, bfloat16": int8("bfloat16"),
    "adamw": adamw(),
    "embedding_bwd, bfloat16": embedding_bwd(),
}


def most_allocated(run: Any) -> int:
    """The most bytes that torch's CPU allocator held at once of what was allocated during `run()`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def value_of(spec: Any) -> Any:
    shape, dtype = spec
    if dtype == "bool":
        return torch.ones(shape, dtype=torch.bool).tril()
    if dtype in ("int64", "uint8", "int8"):
        return torch.ones(shape, dtype=getattr(torch, dtype)) if shape else 1
    return torch.rand(shape, dtype=getattr(torch, dtype)) + 0.5


OF_ATEN = [name for name in CASES if name.startswith("attention")]
"""Of which there are compiled kernels too, which allocate nothing."""


@pytest.mark.parametrize("name", CASES)
def test_temporaries_are_what_torch_allocates(name):
    check(*CASES[name])


@pytest.mark.parametrize("name", OF_ATEN)
def test_temporaries_without_a_compiler(name, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert check(*CASES[name]) > 0


def check(op: str, specs: list[Any], attrs: dict[str, Any]) -> int:
    """The bytes that are declared, which must be what is allocated."""
    graph = Graph()
    inputs = [None if spec is None else graph.input(f"{at}", *spec) for at, spec in enumerate(specs)]
    OPS[op](*inputs, **attrs)
    node = graph.nodes[-1]
    for index, out in enumerate(node.outputs):
        graph.output(f"grad.{index}", out)  # no copy is made of a gradient
    program = CpuNative().program(graph)
    given = {f"{at}": value_of(spec) for at, spec in enumerate(specs) if spec is not None}
    program(given)
    allocated = most_allocated(lambda: program.again(given))
    declared = program.temporaries[node]
    assert allocated - SCALARS <= declared <= 1.2 * allocated
    return declared
