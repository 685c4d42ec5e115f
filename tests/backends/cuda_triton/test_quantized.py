"""Weights of 4 and 8 bits on Triton: to the bit where numbers are made, against float64 where they are summed."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import smedjan.ops.quantized  # noqa: F401  (declares the ops)
from smedjan.backends.cuda_triton import quantized as rules
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import quantized as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.immediate import node_of
from smedjan.backends.torch_reference import backend, quantized
from smedjan.backends.torch_reference.elementwise import DTYPES as TORCH
from smedjan.checkpoint import nf4
from tests.backends.cuda_triton.mutate import fails, mutated
from tests.tolerances import assert_close

DTYPES = ["float32", "bfloat16", "float16"]


def _generated() -> list[tuple[int, int]]:
    """Weights [O, I]: corners, and 34 more with short last blocks, odd counts and several nested blocks."""
    draw = random.Random(20261124)
    corners = [(1, 1), (1, 2), (1, 63), (1, 64), (1, 65), (3, 43), (2, 64), (65, 64), (257, 64), (576, 64), (1, 4097)]
    return [*corners, *((draw.randint(1, 40), draw.randint(1, 200)) for _ in range(34))]


SHAPES = _generated()


def _products(multiple: int) -> list[tuple[int, int, int]]:
    """(rows, O, I), I a multiple: corners, and 38 more."""
    draw = random.Random(multiple)
    corners = [(1, 1, 1), (1, 5, 2), (16, 3, 1), (1, 2, 17), (2, 1, 16), (4, 4, 9)]
    rows = (draw.choice((1, 1, 2, 3, 4, 5, 7)) for _ in range(38))
    drawn = ((count, draw.randint(1, 9), draw.randint(1, 5)) for count in rows)
    return [(count, outs, width * multiple) for count, outs, width in (*corners, *drawn)]


def parts_of(weight: Tensor) -> list[Tensor]:
    """codes, absmax, nested, offset: the host's, which are bitsandbytes'."""
    arrays = backend()
    made = nf4.quantize(arrays.to_raw(weight))
    return [arrays.from_raw(part).to(weight.device) for part in made.values()]


def on_host(parts: list[Tensor], shape: tuple[int, int], dtype: str) -> Tensor:
    arrays = backend()
    named = zip((nf4.CODES, nf4.ABSMAX, nf4.NESTED, nf4.OFFSET), parts, strict=True)
    return arrays.from_raw(nf4.dequantize({name: arrays.to_raw(part) for name, part in named}, shape, dtype))


def in_float64(parts: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """The format's formula, written again: codes by division, blocks by number."""
    codes, absmax, nested, offset = (part.cpu().double().numpy() for part in parts)
    values = np.arange(shape[0] * shape[1])
    code = (codes[values // 2] // np.where(values % 2 == 0, 16, 1) % 16).astype(int)
    block = values // 64
    scale = nf4.DYNAMIC.astype(np.float64)[absmax[block].astype(int)] * nested[block // 256] + offset
    return torch.from_numpy(nf4.NORMAL.astype(np.float64)[code] * scale).view(shape)


@pytest.mark.parametrize(("index", "shape"), enumerate(SHAPES), ids=lambda value: str(value).replace(" ", ""))
def test_dequantised_weights_have_the_hosts_bits(rand, same, index, shape):
    dtype = DTYPES[index % 3]
    parts = parts_of(rand(*shape))
    made, host = apply("nf4_dequantize", *parts, shape=shape, dtype=dtype).cpu(), on_host(parts, shape, dtype)
    same(made, host)
    same(quantized.nf4_dequantize(*parts, shape=shape, dtype=dtype).cpu(), host)
    assert_close("w", made, in_float64(parts, shape), host)


@pytest.mark.parametrize(("index", "shape"), enumerate(SHAPES), ids=lambda value: str(value).replace(" ", ""))
def test_codes_made_on_the_device_are_the_hosts(rand, index, shape):
    weight = rand(*shape, dtype=TORCH[DTYPES[index % 3]])
    codes, absmax = apply("nf4_quantize", weight)
    host, scales = nf4.quantize_values(weight.float().cpu().numpy().reshape(-1))
    assert np.array_equal(codes.cpu().numpy(), host)
    assert np.array_equal(absmax.cpu().numpy(), scales)
    for ours, aten in zip((codes, absmax), quantized.nf4_quantize(weight), strict=True):
        assert torch.equal(ours, aten)


def test_ties_zeros_and_large_values_have_the_hosts_codes(device):
    bounds = torch.from_numpy(nf4.BOUNDS)
    sides = (torch.nextafter(bounds, torch.full_like(bounds, side)) for side in (-2.0, 2.0))
    values = torch.cat((bounds, *sides, torch.tensor([1.0, -0.0, 0.0])))
    blocks = torch.zeros(6, 64)
    blocks[0, : len(values)], blocks[1, 3], blocks[2], blocks[3] = values, 3e38, torch.randn(64) * 1e-37, -1.0
    weight = torch.cat((blocks.view(-1), values)).view(1, -1).to(device)
    codes, absmax = apply("nf4_quantize", weight)
    host, scales = nf4.quantize_values(weight.cpu().numpy().reshape(-1))
    assert np.array_equal(codes.cpu().numpy(), host)
    assert np.array_equal(absmax.cpu().numpy(), scales)


@pytest.mark.parametrize(("index", "sizes"), enumerate(_products(64)), ids=lambda value: str(value).replace(" ", ""))
def test_nf4_linear_is_within_the_derived_bound(rand, index, sizes):
    rows, outs, width = sizes
    dtype = TORCH[DTYPES[index % 3]]
    parts, x = parts_of(rand(outs, width)), rand(rows, width, dtype=dtype)
    bias = rand(outs, dtype=dtype) if index % 2 else None
    made = apply("nf4_linear", x, *parts, bias, shape=(outs, width))
    plain = torch.nn.functional.linear(x, on_host(parts, (outs, width), DTYPES[index % 3]).to(x.device), bias)
    wide = x.double() @ in_float64(parts, (outs, width)).to(x.device).T
    assert_close("y", made, wide if bias is None else wide + bias.double(), plain)


@pytest.mark.parametrize(("index", "sizes"), enumerate(_products(37)), ids=lambda value: str(value).replace(" ", ""))
def test_int8_linear_is_within_the_derived_bound(rand, index, sizes):
    rows, outs, width = sizes
    dtype = TORCH[DTYPES[index % 3]]
    codes, scale = quantized.int8_quantize(rand(outs, width))
    x, bias = rand(rows, width, dtype=dtype), rand(outs, dtype=dtype) if index % 2 else None
    made = apply("int8_linear", x, codes, scale, bias)
    weight = quantized.int8_dequantize(codes, scale, dtype=DTYPES[index % 3])
    wide = x.double() @ (codes.double() * scale.double()[:, None]).T
    plain = torch.nn.functional.linear(x, weight, bias)
    assert_close("y", made, wide if bias is None else wide + bias.double(), plain)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_rows_of_a_wider_buffer(rand, same, kind):
    """x may be a slice of a stacked projection, and have dims before its last."""
    wide, weight = rand(2, 3, 200), rand(5, 128)
    x = wide[..., 8:136]
    if kind == "nf4":
        made, dense = (apply("nf4_linear", each, *parts_of(weight), shape=(5, 128)) for each in (x, x.contiguous()))
    else:
        made, dense = (apply("int8_linear", each, *quantized.int8_quantize(weight)) for each in (x, x.contiguous()))
    assert made.shape == (2, 3, 5)
    same(made, dense)


def test_each_row_has_the_bits_that_it_has_alone_in_a_full_tile(rand, same):
    """Rows share a program, never a sum."""
    x, parts = rand(8, 192), parts_of(rand(6, 192))
    whole = apply("nf4_linear", x, *parts, shape=(6, 192))
    same(whole[4:], apply("nf4_linear", x[4:], *parts, shape=(6, 192)))


def test_the_plan_says_what_runs(rand):
    """Few rows of whole blocks are multiplied from their bits, others as what they are made of."""
    label = "triton nf4_linear"
    for rows, width, found in ((1, 128, label), (16, 128, label), (17, 128, None), (1, 96, None)):
        x, parts = rand(rows, width), parts_of(rand(4, width))
        rule = RULES.find(node_of("nf4_linear", (x, *parts, None), {"shape": (4, width)}))
        assert (rule and rule.label) == found
    x, (codes, scale) = rand(17, 33), quantized.int8_quantize(rand(4, 33))
    assert RULES.find(node_of("int8_linear", (x, codes, scale), {})) is None
    assert RULES.find(node_of("int8_linear", (x[:16], codes, scale), {})).label == "triton int8_linear"


def test_int8_codes_and_scales():
    """Ties go to even, 127 is the largest code, a row of zeros is zeros again."""
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, -0.0, 0.0, 0.0, 0.0], [1e-45, 0.0, -1e-45, 0.0, 0.0]])
    codes, scale = quantized.int8_quantize(weight)
    assert codes[0].tolist() == [127, 0, 2, -2, -127]
    assert scale.tolist()[:2] == [1.0, 0.0]
    assert not quantized.int8_dequantize(codes, scale, dtype="float32")[1].any()
    weight = torch.randn(7, 129, generator=torch.Generator().manual_seed(3)).double()
    codes, scale = quantized.int8_quantize(weight.float())
    back = codes.double() * scale.double()[:, None]
    assert ((back - weight).abs() <= 0.5001 * weight.abs().amax(1, keepdim=True) / 127).all()


MUTATIONS = {
    "nibbles swapped": {
        "tl.load(normal + (both >> 4)), tl.load(normal + (both & 15))": "tl.load(normal + (both & 15)), "
        "tl.load(normal + (both >> 4))"
    },
    "no offset": {"* largest + tl.load(offset)": "* largest"},
    "a block too late": {"absmax + block, mask=inside": "absmax + tl.maximum(block - 1, 0), mask=inside"},
    "the wrong nested block": {"block // NESTED_BLOCK": "block // (2 * NESTED_BLOCK)"},
}


def _dequantised(rand: Callable[..., Tensor]) -> None:
    shape = (264, 64)
    weight = rand(*shape)
    weight[256:] *= 3
    parts = parts_of(weight)
    made = apply("nf4_dequantize", *parts, shape=shape, dtype="float32")
    assert_close("w", made.cpu(), in_float64(parts, shape), on_host(parts, shape, "float32"))


def _multiplied(rand: Callable[..., Tensor]) -> None:
    weight, x = rand(3, 192), rand(2, 192)
    parts = parts_of(weight)
    made = apply("nf4_linear", x, *parts, shape=(3, 192))
    plain = torch.nn.functional.linear(x, on_host(parts, (3, 192), "float32").to(x.device))
    assert_close("y", made, x.double() @ in_float64(parts, (3, 192)).to(x.device).T, plain)


def _int8(rand: Callable[..., Tensor]) -> None:
    x, (codes, scale) = rand(2, 1100), quantized.int8_quantize(rand(3, 1100))
    made = apply("int8_linear", x, codes, scale)
    plain = torch.nn.functional.linear(x, quantized.int8_dequantize(codes, scale, dtype="float32"))
    assert_close("y", made, x.double() @ (codes.double() * scale.double()[:, None]).T, plain)


CASES = [*((_dequantised, name) for name in MUTATIONS), *((_multiplied, name) for name in [*MUTATIONS][:3])]
"""The product's weight has one nested block."""


@pytest.mark.parametrize(("check", "name"), CASES)
def test_a_wrong_reading_of_the_format_fails(rand, monkeypatch, tmp_path, check, name):
    check(rand)
    monkeypatch.setattr(rules, "kernels", mutated(kernels, MUTATIONS[name], tmp_path))
    assert fails(lambda: check(rand))


@pytest.mark.parametrize(
    ("check", "edit"),
    [
        (_multiplied, {"(first * left + second * right)": "first * left"}),
        (_multiplied, {"x_stride + within * BLOCK": "x_stride + within * BYTES"}),
        (_int8, {"range(0, width, COLS)": "range(0, width - COLS, COLS)"}),
        (_int8, {"* each[None, :]": "* tl.sum(each)"}),
    ],
    ids=["half of each byte", "x half as far", "a skipped tile", "one scale for all rows"],
)
def test_a_wrong_product_fails(rand, monkeypatch, tmp_path, check, edit):
    check(rand)
    monkeypatch.setattr(rules, "kernels", mutated(kernels, edit, tmp_path))
    assert fails(lambda: check(rand))
