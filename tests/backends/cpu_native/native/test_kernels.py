"""Every kernel of a decoding graph is as near the float64 value as plain torch calls, at odd sizes, by any threads."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from smedjan.backends.cpu_native.native import tape
from smedjan.backends.cpu_native.native.glu import NUMBERS
from smedjan.backends.cpu_native.table import RULES, NativeRule, decoding
from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.graph.lowering import Rule, RuleTable
from smedjan.graph.node import Graph, Node
from smedjan.ops.activation import ACTIVATIONS
from smedjan.ops.elementwise import add, scale
from smedjan.ops.embedding import embedding, take_rows
from smedjan.ops.flash import cached_attention
from smedjan.ops.glu import glu
from smedjan.ops.linear import linear, linear_group
from smedjan.ops.norm import add_rms_norm, rms_norm
from smedjan.ops.quantized import int8_embedding, int8_linear
from smedjan.ops.rope import RopeConfig, qk_norm_rope, rope_tables
from tests.backends.cpu_native.fused_cases import Case, normal
from tests.tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16]


class Kernels(RuleTable):
    """Kernels wherever there is one, in a decoding graph or not."""

    def find(self, node: Node) -> Rule | None:
        fitting = [
            rule for rule in RULES.compiled.get(node.op.name, ()) if rule.supports is None or rule.supports(node)
        ]
        return fitting[0] if fitting else super().find(node)


KERNELS = Kernels("kernels", parent=ATEN)


def _linear(columns: int, *sizes: int, biased: bool = False) -> tuple[str, Case]:
    arrays = {"x": normal(1, 1, columns)} | {f"w{i}": normal(size, columns) for i, size in enumerate(sizes)}
    if biased:
        arrays |= {f"b{i}": normal(size) for i, size in enumerate(sizes)}
    if len(sizes) == 1:
        return "linear", Case(linear, arrays)
    return "linear_group", Case(lambda x, *rest: linear_group(x, *rest, biased=biased), arrays)


def _int8(columns: int, size: int, *, biased: bool = False) -> tuple[str, Case]:
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-127, 128, (size, columns), generator=generator, dtype=torch.int8)
    arrays = {"x": normal(1, columns), "codes": codes, "scale": normal(size).abs()}
    if biased:
        arrays["b"] = normal(size)
    return "int8_linear", Case(int8_linear, arrays, kept=("scale",))


def _norm(dim: int, rows: int = 1, **attrs: Any) -> tuple[str, Case]:
    arrays = {"x": normal(1, rows, dim), "w": normal(dim)}
    return "rms_norm", Case(lambda x, w: rms_norm(x, w, eps=1e-5, **attrs), arrays)


def _add_norm(dim: int, **attrs: Any) -> tuple[str, Case]:
    def build(x, delta, w):
        total, y = add_rms_norm(x, delta, w, eps=1e-5, **attrs)
        return add(total, y)

    return "add_rms_norm", Case(build, {"x": normal(1, 1, dim), "d": normal(1, 1, dim), "w": normal(dim)})


def _qk(heads: int, groups: int, dim: int, turned: int, *, normed: bool, wide: bool = False, **attrs: Any):
    angles = normal(1, 1, 1, turned // 2, scale=2.0)
    angles = angles.repeat_interleave(2, -1) if attrs.get("interleaved") else angles.repeat(1, 1, 1, 2)
    arrays = {"q": normal(1, heads, 1, dim), "k": normal(1, groups, 1, dim)}
    if normed:
        arrays |= {"qw": normal(dim), "kw": normal(dim)}
    arrays |= {"cos": angles.cos(), "sin": angles.sin()}

    def build(which):
        def made(q, k, *rest):
            *weights, cos, sin = rest
            return qk_norm_rope(q, k, *(weights or (None, None)), cos, sin, eps=1e-6, **attrs)[which]

        return made

    return [("qk_norm_rope", Case(build(i), arrays, kept=("cos", "sin") if wide else ())) for i in (0, 1)]


def _attention(heads: int, groups: int, dim: int, places: int, length: int, **attrs: Any) -> tuple[str, Case]:
    arrays = {"q": normal(1, heads, 1, dim), "k": normal(1, groups, places, dim), "v": normal(1, groups, places, dim)}
    arrays["n"] = torch.tensor(length)
    arrays["k"][:, :, length:] = 1e4  # what is not filled must not be seen

    def build(q, k, v, n):
        return cached_attention(q, k, v, None, n, None, scale=dim**-0.5, **attrs)

    return "cached_attention", Case(build, arrays)


def _cases() -> dict[str, tuple[str, Case]]:
    """The bound is of the largest error among a case's outputs: each has enough of them for that to mean something."""
    made = {}
    for columns, size in ((1, 1), (15, 33), (16, 35), (63, 32), (64, 41), (130, 37), (576, 39)):
        made[f"linear {columns} {size}"] = _linear(columns, size)
        made[f"int8 {columns} {size}"] = _int8(columns, size, biased=size % 2 == 1)
    made["linear biased"] = _linear(33, 34, biased=True)
    made["group"] = _linear(48, 17, 12, 12)
    made["group of four, biased"] = _linear(31, 15, 1, 13, 12, biased=True)
    for dim in (1, 33, 130):
        made[f"rms_norm {dim}"] = _norm(dim)
        made[f"rms_norm after {dim}"] = _norm(dim, weight_cast="after", offset=1.0)
        made[f"add_rms_norm {dim}"] = _add_norm(dim)
        made[f"add_rms_norm after {dim}"] = _add_norm(dim, weight_cast="after", offset=1.0, factor=0.22)
    made["rms_norm of rows"] = _norm(10, rows=5)
    for interleaved in (False, True):
        for normed in (False, True):
            for index, case in enumerate(_qk(5, 1, 10, 6, normed=normed, interleaved=interleaved)):
                made[f"{'norm + ' * normed}rope{' interleaved' * interleaved} {'qk'[index]}"] = case
    for index, case in enumerate(
        _qk(3, 3, 8, 8, normed=True, wide=True, upcast="terms", weight_cast="after", offset=1.0)
    ):
        made[f"norm + rope of wide tables {'qk'[index]}"] = case
    for dim, places, length in ((1, 1, 1), (10, 40, 33), (64, 128, 128), (80, 70, 65), (130, 9, 4)):
        made[f"attention {dim} {length}"] = _attention(6, 2, dim, places, length)
    made["attention of a window"] = _attention(4, 4, 16, 64, 50, window=7)
    made["attention, a window not full"] = _attention(4, 4, 16, 64, 5, window=7)
    made["attention capped"] = _attention(4, 1, 16, 64, 50, cap=2.0)
    for act in NUMBERS:
        arrays = {"gate": normal(1, 1, 133, scale=4), "up": normal(1, 1, 133)}
        made[f"glu {act}"] = ("glu", Case(lambda gate, up, act=act: glu(gate, up, act=act), arrays))
    made["add"] = ("add", Case(add, {"x": normal(1, 1, 33), "y": normal(1, 1, 33)}))
    made["scale"] = ("scale", Case(lambda x: scale(x, factor=0.3), {"x": normal(1, 1, 33)}))
    ids = torch.tensor([[3]])
    made["embedding"] = ("embedding", Case(lambda w, ids: embedding(ids, w), {"w": normal(5, 33), "ids": ids}))
    _, eight = _int8(33, 7)
    arrays = {"ids": torch.tensor([[6]]), "codes": eight.arrays["codes"], "scale": eight.arrays["scale"]}
    for dtype in ("float32", "bfloat16"):
        build = partial(int8_embedding, dtype=dtype)
        made[f"int8_embedding {dtype}"] = ("int8_embedding", Case(build, arrays, kept=("scale",)))
    rows = torch.tensor([4, 0, 3])
    made["take_rows"] = ("take_rows", Case(take_rows, {"x": normal(5, 2000), "rows": rows}))
    return made


CASES = _cases()


def test_every_kernel_has_a_case() -> None:
    assert {op for op, _ in CASES.values()} == RULES.compiled.keys() - {"kv_write", "rope_tables"}
    assert NUMBERS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_are_within_the_bound(kernels, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for name, (op, case) in CASES.items():
            try:
                case.check(KERNELS, op, dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}, {threads} threads: {error}") from error


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rope_tables_are_torchs(kernels, dtype: str, interleaved: bool) -> None:
    """To 2 units of the last place of values of size one: cosf and sinf of libm beside torch's."""
    for rope_type, more in (("default", {}), ("linear", {"factor": 4.0}), ("yarn", {"factor": 4.0, "beta_fast": 32.0})):
        rope = RopeConfig(rope_type=rope_type, original_max_position_embeddings=64, **more)
        for position in (0, 1, 77, 4000):
            ids = torch.tensor([[position]])
            attrs = {"rope": rope, "head_dim": 14, "dtype": dtype, "interleaved": interleaved}
            graph = Graph()
            rope_tables(graph.input("p", (1, 1), "int64"), **attrs)
            rule = KERNELS.find(graph.nodes[-1])
            assert isinstance(rule, NativeRule)
            plain = ATEN.find(graph.nodes[-1])
            assert plain is not None
            for ours, theirs in zip(rule.run(ids, **attrs), plain.run(ids, **attrs), strict=True):
                unit = 2.0**-23 if dtype == "float32" else 2.0**-8
                assert ours.shape == theirs.shape
                assert (ours.double() - theirs.double()).abs().max() <= 2 * unit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_write_writes_one_place(kernels, dtype) -> None:
    cache, kv = normal(1, 5, 7, 3).to(dtype), normal(1, 5, 1, 3).to(dtype)
    expected = cache.clone()
    expected[:, :, 4:5] = kv
    assert RULES.compiled["kv_write"][0].run(cache, kv, 4) is cache
    assert torch.equal(cache, expected)


def test_nan_and_infinity_pass_through(kernels) -> None:
    run = RULES.compiled["linear"][0].run
    w = normal(5, 70)
    w[1, 3], w[2, 69] = float("nan"), float("inf")
    for dtype in DTYPES:
        y = run(torch.ones(1, 70, dtype=dtype), w.to(dtype), None)
        assert y.isnan().tolist() == [[False, True, False, False, False]]
        assert y.isinf().tolist() == [[False, False, True, False, False]]
    y = RULES.compiled["glu"][0].run(torch.tensor([float("nan"), 200.0, -200.0]), torch.ones(3), act="silu")
    assert y[0].isnan()
    assert y[1:].tolist() == [200.0, 0.0]


def test_a_tape_is_played_by_more_threads_than_cores_and_after_a_fork(kernels) -> None:
    import os

    x, w = normal(1, 1, 33), normal(64, 33)
    made = tape.Tape()
    y = torch.zeros(1, 1, 64)
    for _ in range(50):
        RULES.compiled["linear"][0].write(made, (x, w, None), (y,))
    made.seal()
    player = tape._player()
    for threads in (1, 5, 2, 7, 3):
        y.zero_()
        player(made._start, 50, threads)
        torch.testing.assert_close(y, x @ w.t())
    child = os.fork()
    if child == 0:
        y.zero_()
        player(made._start, 50, 3)
        os._exit(0 if torch.allclose(y, x @ w.t(), atol=1e-4) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_only_decoding_graphs_are_given_kernels() -> None:
    graph = Graph()
    graph.input("input_ids", (1, 1), "int64")
    assert not decoding(graph)
    graph.input("start", (), "int64")
    assert decoding(graph)
    graph.input("attention_mask", (1, 9), "bool")
    assert not decoding(graph)


def test_tapes_of_different_lengths_one_after_another(kernels) -> None:
    """A worker that leaves a tape late must not go on in the next, longer one: such are the stretches between two aten
    calls of a model with adapters. Each tape is a chain, so that a step that ran early is seen."""
    weights, player, chains = [normal(48, 48, scale=0.2) for _ in range(8)], tape._player(), []
    for length in (1, 8, 2, 7):
        values = [normal(1, 48), *(torch.empty(1, 48) for _ in range(length))]
        made, plain, exact = tape.Tape(), values[0], values[0].double()
        for index in range(length):
            RULES.compiled["linear"][0].write(made, (values[index], weights[index], None), (values[index + 1],))
            plain, exact = plain @ weights[index].t(), exact @ weights[index].double().t()
        made.seal()
        chains.append((made, values, exact, plain))
    for _ in range(200):
        for made, values, exact, plain in chains:
            for value in values[1:]:
                value.fill_(torch.nan)
            player(made._start, len(made.steps), 2)
            assert_close("the last of a chain", values[-1], exact, plain)
