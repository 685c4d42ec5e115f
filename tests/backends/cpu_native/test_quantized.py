"""Widening in chunks gives the exact backend's bits, whatever the sizes of the last chunk and block."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.cpu_native import PLANNED, quantized
from smedjan.backends.torch_reference import RULES
from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.checkpoint import nf4
from smedjan.checkpoint.raw import RawTensor
from smedjan.graph.node import Graph
from smedjan.graph.op import OPS
from smedjan.runtime.select import backend


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (8, 128), (16, 129), (33, 97)])
def test_chunks_give_the_same_bits(monkeypatch, shape, dtype):
    monkeypatch.setattr(quantized, "CHUNK", 128)
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = nf4.quantize(RawTensor.of(draw.numpy()))
    arrays = [backend("torch_reference").from_raw(raw) for raw in stored.values()]
    graph = Graph()
    inputs = [graph.input(name, raw.shape, raw.dtype) for name, raw in stored.items()]
    graph.output("grad.w", OPS["nf4_dequantize"](*inputs, shape=shape, dtype=dtype))
    program = backend("cpu_native").program(graph)
    assert [row["lowering"] for row in program.lowerings()] == [quantized.LABEL]
    found = program(dict(zip(stored, arrays, strict=True)))["grad.w"]
    expected = RULES.lower(graph.nodes[-1]).run(*arrays, shape=shape, dtype=dtype)
    assert found.dtype == DTYPES[dtype]
    assert torch.equal(found, expected)
    assert PLANNED.has(graph.nodes[-1])
