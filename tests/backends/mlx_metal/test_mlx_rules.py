"""Every MLX rule against torch_reference: fused ops against their decomposition, gradients included."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from functools import partial

import mlx.core as mx
import pytest
import torch
from mlx_cases import CACHE_OPS, CASES, _attention, normal
from mlx_pair import MLX, TORCH, check, from_torch, to_torch

import smedjan.ops
from smedjan.backends.mlx_metal import MlxProgram, attention, elementwise, loss
from smedjan.checkpoint.raw import RawTensor
from smedjan.errors import BackendError
from smedjan.graph.lowering import RuleTable
from smedjan.graph.node import Graph
from smedjan.graph.op import OPS
from smedjan.graph.rewrite import BACKWARD_OF
from smedjan.ops.cache import kv_read, kv_write
from smedjan.ops.elementwise import scale_by
from smedjan.ops.offload import to_host
from smedjan.ops.random import keep_mask, uniform
from smedjan.optim.adamw import AdamW

for _module in pkgutil.iter_modules(smedjan.ops.__path__):
    importlib.import_module(f"smedjan.ops.{_module.name}")


LACKING = {
    *("fp8_rounded", "attention_mask", "masked_softmax", "masked_softmax_bwd", "document_bounds", "gather_pages"),
    *("linear_dw_add", "linear_group_dw_add", "to_host", "from_host", "w8a8_linear"),
}
"""What FP8 and `--train.int8-forward` ask for, and what only another backend's fusion emits: here an error that names
the op."""

ELSEWHERE = {"adamw_update", "stochastic_round", "dequantize_blocks", "quantize_blocks"}
"""What is held to the same bits in tests/optim/test_narrow_moments.py, and an update."""


METAL = {"affine_linear", "affine_linear_dx"}
"""What has a rule on Metal alone: tests/backends/mlx_metal/test_mlx_affine.py."""


def decomposed() -> set[str]:
    """Fused ops that this backend runs as what they are defined by."""
    without = set(OPS) - MLX.rules.ops()
    return {name for name in without if OPS[name].decomposition is not None or name in BACKWARD_OF}


def test_every_declared_op_has_a_rule():
    assert set(OPS) - MLX.rules.ops() == decomposed() | LACKING


def test_an_op_without_a_rule_is_an_error_of_this_backend():
    graph = Graph()
    x = graph.input("x", (256,), "float32")
    graph.output("y", to_host(x))
    with pytest.raises(BackendError, match="the backend mlx_metal has no lowering for the op 'to_host'"):
        MLX.program(graph)


def test_every_op_is_run_by_a_case():
    run = {call.node.op.name for case in CASES.values() for call in case.program(MLX, "float32").calls}
    assert set(OPS) - run - CACHE_OPS - METAL - ELSEWHERE == decomposed() | LACKING


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_rule(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("mask", ["causal", "padded", "none"])
def test_attention_by_query_tiles(mask, monkeypatch):
    """Tiles of two or three queries change nothing but the order of sums."""
    monkeypatch.setattr(attention, "TILE_SCORES", 2 * 6 * 11 * 3)
    case = _attention(6, 2, 11, 11, 5, mask)
    assert len(attention._tiles(mx.zeros((2, 6, 11, 5)), mx.zeros((2, 2, 11, 5)))) == 4
    check(case, "float32")
    check(case, "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_by_chunks(dtype, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 2 * 17)
    check(CASES["linear_cross_entropy"], dtype)
    check(CASES["linear_cross_entropy_smoothed"], dtype)
    check(CASES["linear_cross_entropy_z_loss"], dtype)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 5)])
@pytest.mark.parametrize("key", [(0, 0, 0, 0), (2**32 - 1, 2**32 - 1, 2**31, 3), (1234567, 89, 10**9, 0)])
@pytest.mark.parametrize("draw", [partial(keep_mask, p=0.37, site=5), partial(uniform, bound=0.0371, site=2**32 - 1)])
def test_draws_are_equal_to_the_bit(shape, key, draw):
    made = []
    for backend in (TORCH, MLX):
        graph = Graph()
        graph.output("m", draw(graph.input("key", (4,), "int64"), shape=shape))
        found = backend.program(graph)({"key": from_torch(backend, torch.tensor(key))})
        made.append(to_torch(backend, found["m"]))
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("dtype", "clip", "decay"), [("float32", 0.5, 0.1), ("float32", 0.0, 0.0), ("bfloat16", 0.5, 0.1)]
)
def test_adamw_of_three_steps(dtype, clip, decay):
    """Parameters and moments follow torch's."""
    shapes = {"w": ((7, 5), dtype), "b": ((3,), dtype)}
    optimizer = AdamW(clip=clip, weight_decay=decay)
    programs = {b: b.program(optimizer.graph(shapes, exact=b.exact)) for b in (TORCH, MLX)}
    state = {
        f"{kind}{n}": normal(*s) if not kind else torch.zeros(s)
        for n, (s, _) in shapes.items()
        for kind in ("", "exp_avg.", "exp_avg_sq.")
    }
    kind = getattr(torch, dtype)
    live = {b: {name: from_torch(b, array.to(kind)) for name, array in state.items()} for b in programs}
    for step, lr in ((1, 1e-2), (2, 3e-3), (3, 1e-3)):
        grads = {f"grad.{name}": normal(*shape).to(kind) for name, (shape, _) in shapes.items()}
        for backend, program in programs.items():
            inputs = {**live[backend], **{n: from_torch(backend, g) for n, g in grads.items()}, "lr": lr, "step": step}
            live[backend] = program(inputs)
            live[backend].pop("grad_norm")
    unit = 2.0**-24 if dtype == "float32" else 2.0**-8
    for name in state:
        expected, found = (to_torch(b, live[b][name]).double() for b in (TORCH, MLX))
        # Three steps of about five roundings each.
        assert (expected - found).abs().max() <= 16 * unit * expected.abs().max(), name


def test_cache_is_written_and_read_at_host_positions():
    graph = Graph()
    start, end = graph.input("start", (), "int64"), graph.input("end", (), "int64")
    cache = kv_write(graph.input("cache", (1, 2, 6, 3), "float32"), graph.input("kv", (1, 2, 2, 3), "float32"), start)
    graph.output("cache", cache)
    graph.output("read", kv_read(cache, end))
    kept, fresh = normal(1, 2, 6, 3), normal(1, 2, 2, 3)
    program = MLX.program(graph)
    for at in (0, 3):
        made = program({"cache": from_torch(MLX, kept), "kv": from_torch(MLX, fresh), "start": at, "end": at + 2})
        expected = kept.clone()
        expected[:, :, at : at + 2] = fresh
        assert torch.equal(to_torch(MLX, made["cache"]), expected)
        assert torch.equal(to_torch(MLX, made["read"]), expected[:, :, : at + 2])


def test_a_program_without_host_integers_is_compiled_and_traced_once():
    graph = Graph()
    graph.output("y", scale_by(graph.input("x", (3,), "float32"), graph.input("lr", (), "float32")))
    rules, traced = RuleTable("counted", parent=MLX.rules), []
    rules.rule("scale_by")(lambda *arrays: traced.append(1) or elementwise.scale_by(*arrays))
    program = MlxProgram(graph, rules, fuse=True)
    del traced[:]  # planning traces too
    for lr in (1.0, 2.0, 3.0):
        assert program({"x": mx.ones(3), "lr": lr})["y"].tolist() == [lr] * 3
    assert len(traced) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "int32", "bool", "float64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (1,)])
def test_raw_round_trip_keeps_every_byte(dtype, shape):
    array = torch.arange(6).reshape(2, 3)
    array = {(): array[0, 1], (0, 3): array[:0], (2, 3): array, (1,): array[0, :1]}[shape].to(getattr(torch, dtype))
    raw = TORCH.to_raw(array)
    back = MLX.to_raw(MLX.from_raw(raw))
    assert (back.dtype, back.shape, back.data.tobytes()) == (raw.dtype, raw.shape, raw.data.tobytes())


def test_transposed_arrays_leave_in_c_order():
    raw = MLX.to_raw(mx.arange(6, dtype=mx.int32).reshape(2, 3).T)
    assert raw.data.cast("i").tolist() == [0, 3, 1, 4, 2, 5]


def test_from_raw_copies():
    data = bytearray(4)
    array = MLX.from_raw(RawTensor(dtype="float32", shape=(1,), data=memoryview(data)))
    data[:] = b"\xff" * 4
    assert array.item() == 0.0


def test_the_backend_imports_neither_torch_nor_numpy_of_its_own():
    absent = "{'torch', 'triton', 'transformers', 'numpy'}"
    code = f"import sys, smedjan.backends.mlx_metal; assert not {absent} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
