"""Elementwise ops and sums over broadcast dims on Triton against float64 torch, over every kind of strides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import smedjan.ops.linear  # noqa: F401  (declares bias_grad)
from smedjan.backends.cuda_triton import elementwise, layout
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.ops import elementwise as ew
from tests.backends.cpu_native.fused_cases import Case
from tests.backends.cuda_triton.conftest import DEVICE
from tests.backends.cuda_triton.edited import edited
from tests.backends.cuda_triton.shapes import DTYPES, LAYOUTS, into, laid_out, numbered, result_of, shapes
from tests.tolerances import UNIT_ROUNDOFF, assert_close

UNARY: dict[str, tuple[dict[str, float], Callable[[Tensor], Tensor]]] = {
    "scale": ({"factor": 0.3}, lambda x: x * 0.3),
    "divide": ({"divisor": 0.3}, lambda x: x / 0.3),
    "add_scalar": ({"value": 0.7}, lambda x: x + 0.7),
    "square": ({}, lambda x: x.pow(2)),
    "power": ({"exponent": 3.0}, lambda x: x.pow(3.0)),
    "rsqrt": ({}, torch.rsqrt),
    "copy": ({}, torch.clone),
}
pytestmark = [
    # The interpreter computes what is masked too.
    pytest.mark.filterwarnings("ignore:divide by zero encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}


def narrowed(shape: tuple[int, ...], number: int) -> tuple[int, ...]:
    """A shape that broadcasts to `shape`: some dims of one place, some leading ones gone."""
    bits = number * 2654435761 >> 7
    some = tuple(1 if bits >> n & 1 else size for n, size in enumerate(shape))
    return some[bits >> 5 & 1 :] if len(shape) > 1 else some


@pytest.mark.parametrize(("number", "shape"), **numbered(shapes(1)))
def test_one_operand(rand, number, shape):
    dtype, how = DTYPES[number % 3], LAYOUTS[number % 4]
    x = laid_out(rand(*shape, dtype=dtype).abs() + 0.5, how)
    for name, (attrs, plain) in UNARY.items():
        y = apply(name, x, **attrs)
        assert y.dtype == dtype
        assert_close(name, y, plain(x.double()), plain(x))


@pytest.mark.parametrize(("number", "shape"), **numbered(shapes(2)))
def test_two_operands(rand, number, shape):
    """Broadcast either way, and both the same; the result in a place of any layout."""
    dtype, how = DTYPES[number % 3], LAYOUTS[number % 4]
    x = laid_out(rand(*shape, dtype=dtype), how)
    for other in (narrowed(shape, number), shape):
        z = laid_out(rand(*other, dtype=dtype), LAYOUTS[number // 4 % 4])
        for name, plain in BINARY.items():
            for a, b in ((x, z), (z, x)):
                y = result_of(name, a, b, how=LAYOUTS[number // 3 % 4])
                assert_close(name, y, plain(a.double(), b.double()), plain(a, b))
        positive = laid_out(rand(*other, dtype=dtype).abs() + 0.5, LAYOUTS[number // 4 % 4])
        assert_close("div", apply("div", x, positive), x.double() / positive.double(), x / positive)


@pytest.mark.parametrize(("number", "shape"), **numbered(shapes(3)))
def test_scalars_of_the_device(rand, number, shape):
    dtype = DTYPES[number % 3]
    x, factor = laid_out(rand(*shape, dtype=dtype), LAYOUTS[number % 4]), rand(1).abs()[0] + 0.5
    assert_close("scale_by", apply("scale_by", x, factor), x.double() * factor.double(), x * factor)
    assert_close("divide_by", apply("divide_by", x, factor), x.double() / factor.double(), x / factor)


@pytest.mark.parametrize(("number", "shape"), **numbered(shapes(4)))
def test_gradients(rand, number, shape):
    dtype = DTYPES[number % 3]
    x, z = rand(*shape), rand(*narrowed(shape, number))
    positive = {"x": x.abs() + 0.5}
    cases = {
        "add": Case(ew.add, {"a": x, "b": z}, ("a", "b")),
        "sub": Case(ew.sub, {"a": z, "b": x}, ("a", "b")),
        "mul": Case(ew.mul, {"a": x, "b": z}, ("a", "b")),
        "rsqrt_bwd": Case(ew.rsqrt, positive, ("x",)),
        "power": Case(lambda x: ew.power(x, exponent=3.0), positive, ("x",)),
        "square": Case(ew.square, positive, ("x",)),
        "divide": Case(lambda x: ew.divide(x, divisor=3.0), positive, ("x",)),
    }
    for op, case in list(cases.items())[number % 2 :: 2]:
        case.check(RULES, op, dtype)


def roundings(x: Tensor, total: Callable[[Tensor], Tensor]) -> float:
    """What a sum's errors are relative to: the result's rounding to itself, those of the float32 sum to its terms'
    absolute values (Higham, "The accuracy of floating point summation", 1993), since the whole may cancel."""
    whole, terms = float(total(x.double()).abs().max()), float(total(x.double().abs()).max())
    return whole + terms * UNIT_ROUNDOFF[torch.float32] / UNIT_ROUNDOFF[x.dtype]


def sums(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes that were broadcast to `shape`: nothing left, the last dim, the first, every other."""
    some = [(), shape[-1:], (shape[0], *(1 for _ in shape[1:])), tuple(n if i % 2 else 1 for i, n in enumerate(shape))]
    return list(dict.fromkeys(some))


@pytest.mark.parametrize(("number", "shape"), **numbered([*shapes(5), (1500, 3), (3, 5000), (700, 5, 2)]))
def test_sums(rand, number, shape):
    dtype = DTYPES[number % 3]
    x = laid_out(rand(*shape, dtype=dtype), LAYOUTS[number % 4])
    for target in sums(shape):
        lead = x.ndim - len(target)
        dims = [*range(lead), *(i for i in range(lead, x.ndim) if target[i - lead] == 1)]

        def total(z: Tensor, dims: list[int] = dims, target: tuple[int, ...] = target) -> Tensor:
            return (z.sum(dims, keepdim=True) if dims else z).reshape(target)

        y = apply("sum_to", x, shape=target)
        assert_close(f"to {target}", y, total(x.double()), total(x), scale=roundings(x, total))

    def bias(z: Tensor) -> Tensor:
        return z.reshape(-1, shape[-1]).sum(0)

    assert_close("bias", apply("bias_grad", x), bias(x.double()), bias(x), scale=roundings(x, bias))


def test_a_sum_is_the_same_on_every_run(rand, allocations):
    x = rand(3000, 33)
    first = apply("bias_grad", x)
    assert any(size > 33 for size in allocations.sizes), "it was not split"
    assert torch.equal(first, apply("bias_grad", x))


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_casts_are_torchs_to_the_bit(rand, source, target):
    x = torch.cat([rand(1000, scale=100.0), rand(500, scale=1e-3), torch.tensor([0.0, -0.0, float("inf"), -1e30])])
    x = x.to(DEVICE).to(source)
    for how in LAYOUTS:
        made = apply("_cast", laid_out(x, how), dtype=str(target).removeprefix("torch."))
        assert made.dtype == target
        assert torch.equal(made, x.to(target))


@pytest.mark.parametrize("exponent", [-8, -2, -1, 0, 1, 2, 5, 8])
def test_powers(rand, exponent):
    x = rand(3, 33).abs() + 0.5
    assert_close("y", apply("power", x, exponent=float(exponent)), x.double().pow(exponent), x.pow(exponent))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one(dtype):
    made = apply("ones", dtype=str(dtype).removeprefix("torch."))
    assert made.shape == ()
    assert made.dtype == dtype
    assert float(made) == 1.0


def test_a_result_may_take_the_place_of_what_it_is_made_of(rand, same):
    x, z = rand(5, 130), rand(5, 130)
    for name in BINARY:
        expected = apply(name, x, z)
        for place in (0, 1):
            operands = (x.clone(), z.clone())
            into(name, (operands[place],), *operands)
            same(operands[place], expected)


def test_views_are_no_copies(rand, same):
    x = rand(6, 4)
    assert apply("identity", x).data_ptr() == x.data_ptr()
    assert apply("reshape", x, shape=(2, 12)).data_ptr() == x.data_ptr()
    same(apply("reshape", x.t(), shape=(2, 12)), x.t().reshape(2, 12))


def test_contiguous_arrays_are_one_row_and_views_need_as_few_dims_as_they_have():
    x = torch.empty(4, 8, 16, 64, device="meta")
    assert (layout.walk(x, x).rows, layout.walk(x, x).width) == (1, x.numel())
    moved = x.permute(0, 2, 1, 3)
    assert layout.walk(moved, moved).rows == 1
    assert layout.walk(x, x[0, 0, 0]).outer == (1, 1, 4 * 8 * 16)
    assert layout.walk(x, torch.empty(4, 16, 8, 64, device="meta").transpose(1, 2)).outer == (4, 8, 16)
    assert layout.walk(x, torch.empty(8, 1, 64, device="meta")).outer == (4, 8, 16)
    assert layout.walk(x, torch.empty(1, device="meta")).outer == (1, 1, 1)


def test_what_is_empty_launches_nothing(rand):
    empty = rand(0, 33)
    assert into("add", (empty,), empty, empty) == []
    assert into("scale", (empty,), empty, factor=2.0) == []
    assert torch.equal(apply("sum_to", empty, shape=(33,)), torch.zeros(33, device=DEVICE))


MUTATIONS = {
    "the number of a row among three dims": ("near = (rest % size1)", "near = (index % size1)"),
    "b is read where a is": ("two = tl.load(b + second", "two = tl.load(b + first"),
    "the last rows are dropped": ("return row, col, (row < rows)", "return row, col, (row < rows - 1)"),
    "the last tile of a sum is dropped": ("tl.cdiv(reduced, REDUCED))", "reduced // REDUCED)"),
    "splits share a place": ("target = out + tl.program_id(1).to(tl.int64) * kept + k", "target = out + k"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_breaks_the_bound(rand, monkeypatch, tmp_path, name):
    old, new = MUTATIONS[name]
    a, b = laid_out(rand(3, 4, 6, 8), "moved"), rand(4, 1, 8)
    x = rand(9001, 3, dtype=torch.bfloat16)

    def check() -> None:
        assert_close("add", apply("add", a, b), a.double() + b.double(), a + b)
        assert_close("sum", apply("bias_grad", x), x.double().sum(0), x.sum(0))

    check()
    monkeypatch.setattr(elementwise, "kernels", edited(elementwise.kernels, old, new, tmp_path))
    with pytest.raises(AssertionError, match="> bound"):
        check()
