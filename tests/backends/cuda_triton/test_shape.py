"""Parts of tensors and moves of heads on Triton: torch's values to the bit, without a copy where none is needed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from smedjan.backends.cuda_triton import elementwise, shape
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned.immediate import node_of
from smedjan.backends.planned.table import ViewRule
from smedjan.backends.torch_reference.table import RULES as ATEN
from smedjan.ops import attention as att
from smedjan.ops import shape as parts
from tests.backends.cpu_native.fused_cases import Case
from tests.backends.cuda_triton.edited import edited
from tests.backends.cuda_triton.shapes import DTYPES, LAYOUTS, into, laid_out, numbered, result_of, shapes
from tests.tolerances import assert_close

HEADS = [(1, 1, 1, 1), (1, 3, 1, 8), (2, 1, 5, 4), (2, 6, 5, 8), (1, 4, 33, 10), (3, 2, 7, 16)]


def plain(name: str, *ins: Any, **attrs: Any) -> Any:
    return ATEN.lower(node_of(name, ins, attrs)).run(*ins, **attrs)


@pytest.mark.parametrize(("number", "size"), **numbered(shapes(41)))
def test_parts(rand, number, size):
    draw, dtype, how = random.Random(number), DTYPES[number % 3], LAYOUTS[number % 4]
    x = laid_out(rand(*size, dtype=dtype), how)
    dim = draw.randrange(-len(size), len(size))
    start = draw.randrange(size[dim])
    some = draw.randint(1, size[dim] - start)
    made = apply("narrow", x, dim=dim, start=start, size=some)
    assert torch.equal(made, x.narrow(dim, start, some))
    assert made.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    cuts = (start, size[dim] - start) if start else (size[dim],)
    pieces = apply("split", x, sizes=cuts, dim=dim)
    for piece, expected in zip(pieces if len(cuts) > 1 else (pieces[0],), x.split(cuts, dim), strict=True):
        assert torch.equal(piece, expected)
    low = draw.randrange(size[-1])
    high = draw.randint(low + 1, size[-1])
    assert torch.equal(apply("slice_last", x, start=low, stop=high), x[..., low:high])
    assert not apply("zeros_like", x).any()


@pytest.mark.parametrize(("number", "size"), **numbered(shapes(42)))
def test_concatenations_and_padded_gradients(rand, number, size):
    draw, dtype, how = random.Random(number), DTYPES[number % 3], LAYOUTS[number // 4 % 4]
    dim = draw.randrange(-len(size), len(size))
    given = [laid_out(rand(*size, dtype=dtype), one) for one in draw.sample(LAYOUTS, draw.randint(1, 3))]
    given.append(rand(*size, dtype=dtype).narrow(dim, 0, draw.randint(1, size[dim])))
    assert torch.equal(result_of("concat", *given, how=how, dim=dim), torch.cat(given, dim))
    dy = laid_out(rand(*size, dtype=dtype), LAYOUTS[number % 4])
    attrs = {"start": (start := draw.randrange(5)), "size": start + size[-1] + draw.randrange(5)}
    assert torch.equal(result_of("slice_last_bwd", dy, how=how, **attrs), plain("slice_last_bwd", dy, **attrs))


def _turned(x: Any) -> Any:
    return parts.concat(*reversed(parts.split(x, sizes=(2, 1, 2), dim=1)), dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(rand, dtype):
    x, z = rand(3, 5, 7), rand(3, 2, 7)
    heads = {"x": rand(2, 6, 5, 8)}
    cases = {
        "concat": Case(
            lambda x: parts.concat(*reversed(parts.split(x, sizes=(2, 1, 2), dim=1)), dim=1), {"x": x}, ("x",)
        ),
        "slice_last_bwd": Case(lambda x: parts.slice_last(x, start=2, stop=5), {"x": x}, ("x",)),
        "narrow": Case(lambda x, z: parts.concat(x, z, dim=1), {"x": x, "z": z}, ("x", "z")),
        "zeros_like": Case(lambda x: parts.split(x, sizes=(2, 3), dim=-2)[1], {"x": x}, ("x",)),
        "merge_heads_bwd": Case(att.merge_heads, heads, ("x",)),
        "split_heads_bwd": Case(lambda x: att.split_heads(x, heads=7), {"x": x}, ("x",)),
        "swap_heads": Case(att.swap_heads, heads, ("x",)),
        "repeat_kv_bwd": Case(lambda x: att.repeat_kv(x, times=3), heads, ("x",)),
        "contiguous": Case(att.contiguous, heads, ("x",)),
    }
    for op, case in cases.items():
        case.check(RULES, op, dtype)


VIEWS: dict[str, tuple[str, dict[str, int]]] = {
    "split_heads": ("BTHD", {"heads": 0}),
    "merge_heads": ("BHTD", {}),
    "split_heads_bwd": ("BHTD", {}),
    "merge_heads_bwd": ("BTHD", {"heads": 0}),
    "swap_heads": ("BHTD", {}),
    "contiguous": ("BHTD", {}),
}


@pytest.mark.parametrize("size", HEADS, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_moves_of_heads_are_views_either_way(rand, name, size):
    """Of what memory allows; and an input that is written to its place for a result is that result."""
    batch, heads, seq, dim = size
    order, attrs = VIEWS[name]
    attrs = {"heads": heads} if attrs else {}
    inside = rand(batch, seq, heads * dim)
    x = inside if order == "BTHD" else inside.view(batch, seq, heads, dim).transpose(1, 2)
    x = x.contiguous() if name == "contiguous" else x
    made = apply(name, x, **attrs)
    assert torch.equal(made, plain(name, x, **attrs))
    assert made.data_ptr() == x.data_ptr()
    if order == "BHTD":
        outside = x.contiguous()
        assert torch.equal(apply(name, outside, **attrs), plain(name, outside, **attrs))
    node = node_of(name, (x,), attrs)
    rule = RULES.lower(node)
    assert isinstance(rule, ViewRule)
    assert rule.inverse is not None
    # A result that is read as heads lies with its heads inside.
    y = torch.empty(made.shape, device=x.device)
    y = y if name in ("merge_heads", "split_heads_bwd", "contiguous") else _inside(y)
    place = rule.inverse(y, node)
    assert place.shape == x.shape
    place.copy_(x)
    assert torch.equal(y, made)


def _inside(y: Tensor) -> Tensor:
    return torch.empty_like(y.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@pytest.mark.parametrize("number", range(40))
def test_repeated_heads(rand, number):
    draw, dtype = random.Random(number), DTYPES[number % 3]
    batch, heads, seq, dim = draw.choice(HEADS)
    times = draw.choice([1, 2, 3, 4])
    x = laid_out(rand(batch, heads, seq, dim, dtype=dtype), LAYOUTS[number % 4])
    x = _inside(x).copy_(x) if number % 5 == 0 else x
    assert torch.equal(apply("repeat_kv", x, times=times), x.repeat_interleave(times, dim=1))
    dy = laid_out(rand(batch, heads * times, seq, dim, dtype=dtype), LAYOUTS[number % 4])
    dy = _inside(dy).copy_(dy) if number % 5 == 0 else dy
    true, ours = (plain("repeat_kv_bwd", z, times=times) for z in (dy.double(), dy))
    assert_close("dx", apply("repeat_kv_bwd", dy, times=times), true, ours)


def test_whole_parts_are_the_drivers_copies(rand):
    x, z = rand(3, 5), rand(2, 5)
    assert into("concat", (torch.empty(5, 5, device=x.device),), x, z, dim=0) == ["memcpy", "memcpy"]
    assert into("concat", (torch.empty(3, 10, device=x.device),), x, x, dim=1) == ["unary", "unary"]


MUTATIONS = {
    "columns one place on": (shape, "(col >= start) & (col < stop)", "(col >= start) & (col <= stop)"),
    "no zeros around": (shape, "value, mask=inside)", "value, mask=given)"),
    "the last block is dropped": (
        elementwise,
        "[:, None] & (col < width)[None, :]",
        "[:, None] & (col < width - 1)[None, :]",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_shows(rand, monkeypatch, tmp_path, name):
    module, old, new = MUTATIONS[name]
    x, z = rand(3, 5), rand(3, 7)

    def holds() -> bool:
        padded = torch.equal(apply("slice_last_bwd", x, size=9, start=2), plain("slice_last_bwd", x, size=9, start=2))
        return padded and torch.equal(apply("concat", x, z, dim=1), torch.cat([x, z], 1))

    assert holds()
    monkeypatch.setattr(module, "kernels", edited(module.kernels, old, new, tmp_path))
    assert not holds()


def test_a_concatenation_along_another_dim_shows(rand, monkeypatch):
    x = rand(3, 3)
    right = apply("concat", x, x.t(), dim=0)
    assert torch.equal(right, torch.cat([x, x.t()]))
    wrong = apply("concat", x, x.t(), dim=1)
    assert not torch.equal(wrong.reshape(6, 3), right)
