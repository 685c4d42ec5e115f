"""What `w8a8_linear` is: numpy's float32 and int64, a rounding at a time; what it refuses, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smedjan.backends.planned.immediate import node_of
from smedjan.backends.torch_reference import RULES
from smedjan.backends.torch_reference.w8a8 import coded_rows, product, w8a8_linear
from smedjan.checkpoint import int8
from smedjan.checkpoint.raw import RawTensor
from smedjan.errors import BackendError, ShapeError
from smedjan.graph.grad import grad
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.rewrite import decompose
from smedjan.ops import w8a8
from smedjan.ops.linear import linear
from smedjan.ops.lora import lora_linear, lora_linear_group
from smedjan.runtime.select import backend
from tests.conftest import assert_bits

SHAPES = [(rows, width, out) for rows in (1, 2, 7) for width in (1, 3, 64, 65) for out in (1, 5, 33)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def coded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as a run makes them."""
    parts, _, _ = int8.quantize(RawTensor.of(weight.float().numpy()))
    codes = np.frombuffer(parts[int8.CODES].data, np.int8).reshape(weight.shape)
    return torch.from_numpy(codes.copy()), torch.from_numpy(np.frombuffer(parts[int8.SCALE].data, np.float32).copy())


def by_hand(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The docstring's equations on numpy: every operation of two float32 is one rounding, sums are int64's."""
    wide, most = x.float().numpy(), np.float32(127)
    y = np.empty((*wide.shape[:-1], len(scale)), np.float32)
    for index in np.ndindex(wide.shape[:-1]):
        row = wide[index]
        if not np.isfinite(row).all():
            y[index] = np.nan
            continue
        largest = np.maximum(np.abs(row).max(), most * np.float32(2.0**-126))
        q = np.rint(row * (most / largest)).astype(np.int64)
        assert np.abs(q).max() <= 127
        sums = codes.numpy().astype(np.int64) @ q
        assert np.abs(sums).max(initial=0) < 2**31
        with np.errstate(over="ignore"):  # of rows at the end of float32's range
            y[index] = sums.astype(np.float32) * (largest / most) * scale.numpy()
        if bias is not None:
            y[index] += bias.float().numpy()
    return torch.from_numpy(y).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
def test_the_equations(rows, width, out, biased, dtype):
    """Rows of sizes from 1e-6 to 1e6, one of them with a value far beyond the others."""
    x = normal(rows, 2, width) * 10.0 ** normal(rows, 2, 1, seed=1).mul(3)
    x[0, 0, -1] *= 1e4
    codes, scale = coded(normal(out, width, seed=2))
    bias = normal(out, seed=3).to(dtype) if biased else None
    x = x.to(dtype)
    assert_bits(product(x, codes, scale, bias), by_hand(x, codes, scale, bias), "y")


@pytest.mark.parametrize(
    "row",
    [
        [0.0, -0.0, 0.0],
        [1e-45, 0.0, -1e-45],
        [127 * 2.0**-126, -(2.0**-126), 0.0],
        [3.4e38, -3.4e38, 1.0],
        [127.0, 0.5, 1.5],
        [-127.0, -2.5, 126.5],
        [float("nan"), 1.0, 2.0],
        [float("inf"), 1.0, 2.0],
        [1.0, float("-inf"), float("nan")],
    ],
    ids=str,
)
def test_rows_at_the_edges(row):
    """Zeros, subnormal numbers, the largest, ties (to the even code), and what is no number, beside a plain row."""
    x = torch.tensor([row, [1.0, -2.0, 3.0]])
    codes, scale = coded(normal(4, 3))
    y = product(x, codes, scale, None)
    finite = bool(np.isfinite(row).all())
    assert_bits(y[1 - finite :], by_hand(x, codes, scale, None)[1 - finite :], "y")
    assert bool(y[1].isfinite().all())
    assert bool(y[0].isnan().all()) == (not finite)


def test_ties_go_to_the_even_code():
    codes, scale = coded_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]]))
    assert codes.tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 126.0]]
    assert scale.item() == 1.0


def test_the_largest_sums_are_exact():
    """Every code 127, of either sign: the sums are 127^2 I, beyond what float32 holds exactly, rounded once."""
    width = 60_001
    x = torch.ones(2, width)
    x[1] = -1
    codes, scale = torch.full((3, width), 127, dtype=torch.int8), torch.ones(3)
    codes[1] = -127
    y = product(x, codes, scale, None)
    whole = np.float32(127**2 * width) * np.float32(np.float32(1) / np.float32(127))
    assert torch.equal(y, torch.tensor([[whole, -whole, whole], [-whole, whole, -whole]]))


def test_a_row_of_weights_of_zeros_and_no_rows_at_all():
    weight = normal(5, 9)
    weight[2] = 0
    codes, scale = coded(weight)
    assert bool((product(normal(4, 9), codes, scale, None)[:, 2] == 0).all())
    assert product(normal(0, 9), codes, scale, None).shape == (0, 5)


def test_a_product_is_near_the_float_one():
    """Of codes a and b with |a - x / s| and |b - w / S| at most 1/2 (and rounding): |y - x w| <= s S sum(|q| + |Q| +
    1/2) / 2, and float32's own few units."""
    x, weight = normal(9, 300), normal(40, 300)
    codes, scale = coded(weight)
    q, s = coded_rows(x)
    off = (product(x, codes, scale, None).double() - x.double() @ weight.double().T).abs()
    most = (s * scale) * (q.abs().sum(-1, keepdim=True) + codes.float().abs().sum(-1) + 150) / 2
    assert bool((off <= most * (1 + 2.0**-10)).all())
    assert float(off.max()) > 0


def _arrays(width: int = 6, outs: tuple[int, ...] = (4, 3), rank: int = 2, dtype: torch.dtype = torch.float32):
    weights = [normal(out, width, seed=n).to(dtype) for n, out in enumerate(outs)]
    codes, scales = zip(*map(coded, weights), strict=True)
    biases = [normal(out, seed=9).to(dtype) for out in outs]
    a = [normal(rank, width, seed=20 + n) for n in range(len(outs))]
    b = [normal(out, rank, seed=30 + n) for n, out in enumerate(outs)]
    return weights, list(codes), list(scales), biases, a, b


def _nodes(op, x, tensors, wrt, **attrs):
    """(op, inputs' numbers) of the nodes that differentiate y, which every case has at the same number."""
    graph = Graph()
    made = [
        graph.input(f"{n}", tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in enumerate((x, *tensors))
    ]
    y = op(*made, **attrs)
    seed = graph.input("dy", y.shape, y.dtype)
    names = {tensor: name for name, tensor in graph.inputs.items()}
    grad(y, [made[n] for n in wrt], seeds={y: seed})
    found = []
    for node in graph.nodes:
        if node.id > seed.node.id:
            found.append(
                (node.op.name, [None if t is None else names.get(t, t.shape) for t in node.inputs], node.attrs)
            )
    return found, made


def test_the_gradient_is_straight_through():
    """dx reads dy and the weight itself, in full precision: no code, no scale, and nothing else."""
    weights, codes, scales, biases, _, _ = _arrays()
    x = normal(5, 6)
    found, _ = _nodes(w8a8.w8a8_linear, x, (weights[0], codes[0], scales[0], biases[0]), [0], biased=True)
    plain, _ = _nodes(linear, x, (weights[0], biases[0]), [0])
    assert found == plain == [("linear_dx", ["dy", "1"], {})]
    found, _ = _nodes(w8a8.w8a8_linear, x, (*weights, *codes, *scales), [0])
    assert found == [("linear_group_dx", ["dy", None, "1", "2"], {})]


def test_the_gradients_of_adapters_are_lora_linear_groups():
    weights, codes, scales, _, a, b = _arrays()
    attrs = {"adapted": (True, True), "scaling": 0.5}
    ours, _ = _nodes(w8a8.w8a8_lora_linear, normal(5, 6), (*weights, *codes, *scales, *a, *b), [0, 7, 9], **attrs)
    plain, _ = _nodes(lora_linear_group, normal(5, 6), (*weights, *a, *b), [0, 3, 5], biased=False, **attrs)
    moved = {"3": "7", "4": "8", "5": "9", "6": "10"}  # adapters stand behind codes and scales
    assert ours == [(op, [moved.get(i, i) if isinstance(i, str) else i for i in ins], at) for op, ins, at in plain]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_beside_it_decomposes_as_loras_does(dtype):
    """By the exact backend: lora_linear's nodes with the base's product in codes, and dx from the float weight: where
    the codes are exact, its bits."""
    weights, _, _, _, a, b = _arrays(outs=(4,), dtype=dtype)
    weight = (weights[0] * 20).round().clamp(-127, 127)
    weight[:, 0] = 127  # whole numbers of scale 1
    codes, scale = coded(weight)
    x = torch.tensor([[127.0, 3.0, -5.0, 0.0, 1.0, 2.0]], dtype=dtype)
    made = []
    for op, tensors, attrs in (
        (lora_linear, (weight, None, a[0], b[0]), {}),
        (w8a8.w8a8_lora_linear, (weight, codes, scale, a[0], b[0]), {"adapted": (True,)}),
    ):
        graph = Graph()
        given = {f"{n}": t for n, t in enumerate((x, *tensors)) if t is not None}
        inputs = [
            None if t is None else graph.input(f"{n}", tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for n, t in enumerate((x, *tensors))
        ]
        graph.output("y", op(*inputs, scaling=0.5, **attrs))
        graph = decompose(graph, RULES.has)
        y = graph.outputs["y"]
        wrt = [graph.inputs[name] for name in ("0", *list(graph.inputs)[-2:])]
        seed = graph.input("dy", y.shape, y.dtype)
        for n, each in enumerate(grad(y, wrt, seeds={y: seed})):
            graph.output(f"d{n}", each)
        made.append(Program(graph, RULES)({**given, "dy": normal(1, 4, seed=5).to(dtype)}))
    for name, array in made[0].items():
        assert_bits(made[1][name], array, name)


def test_the_base_is_frozen():
    weights, codes, scales, *_ = _arrays()
    with pytest.raises(AssertionError, match="frozen"):
        _nodes(w8a8.w8a8_linear, normal(5, 6), (weights[0], codes[0], scales[0]), [1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.zeros(4, 6, dtype=torch.bfloat16)}, "W (4, 6) bfloat16 for x"),
        ({1: torch.zeros(4, 5, dtype=torch.int8)}, "codes "),
        ({2: torch.zeros(5)}, "scale "),
        ({3: torch.zeros(3)}, "bias (3,)"),
    ],
    ids=["weight", "codes", "scale", "bias"],
)
def test_what_does_not_fit(changed, message):
    weights, codes, scales, biases, _, _ = _arrays()
    tensors = [changed.get(n, t) for n, t in enumerate((weights[0], codes[0], scales[0], biases[0]))]
    with pytest.raises(ShapeError) as caught:
        node_of("w8a8_linear", (normal(5, 6), *tensors), {"biased": True})
    assert message in str(caught.value)


def test_a_sum_that_could_leave_int32_is_refused():
    graph = Graph()
    width = w8a8.WIDEST + 1
    assert w8a8.WIDEST * 127**2 < 2**31 <= width * 127**2
    specs = (((1, width), "float32"), ((2, width), "float32"), ((2, width), "int8"), ((2,), "float32"))
    with pytest.raises(ShapeError, match="may leave int32"):
        w8a8.w8a8_linear(*(graph.input(f"{n}", *spec) for n, spec in enumerate(specs)))


@pytest.mark.parametrize("name", ["cuda_triton", "mlx_metal"])
def test_other_backends_say_that_they_lack_it(name):
    if name == "mlx_metal":
        pytest.importorskip("mlx.core")
    weights, codes, scales, *_ = _arrays()
    node = node_of("w8a8_linear", (normal(5, 6), weights[0], codes[0], scales[0]), {})
    with pytest.raises(BackendError, match="has no lowering for the op 'w8a8_linear'"):
        backend(name).rules.lower(node)


def test_a_group_is_its_members():
    weights, codes, scales, biases, _, _ = _arrays()
    x = normal(5, 6)
    whole = w8a8_linear(x, *weights, *codes, *scales, *biases, biased=True)
    each = [product(x, *parts) for parts in zip(codes, scales, biases, strict=True)]
    assert_bits(whole, torch.cat(each, dim=-1), "y")
