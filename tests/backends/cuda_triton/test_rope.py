"""rope on Triton against float64 torch, torch.autograd and transformers' apply_rotary_pos_emb."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smedjan.backends.cuda_triton import rope as rules
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import rope_tables as table_kernels
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned.immediate import immediate, node_of
from smedjan.backends.torch_reference.rope import inverse_frequencies
from smedjan.backends.torch_reference.rope import rope_tables as exact_tables
from smedjan.ops.rope import RopeConfig
from tests.backends.cuda_triton.mutate import fails, mutated
from tests.tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 2), (2, 3, 7, 14), (1, 9, 5, 64), (3, 2, 17, 66), (2, 2, 33, 96), (1, 3, 20, 128)]
LAYOUTS = ["dense", "transposed", "sliced"]


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False) -> Tensor:
    """cos, sin [B or 1, T, D]; `inverse` is the backward pass."""
    attrs = {"interleaved": interleaved, "upcast": "" if cos.dtype == x.dtype else "terms"}
    return apply("rope_bwd" if inverse else "rope", x, cos[:, None], sin[:, None], **attrs)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def tables(batch: int, tokens: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """cos, sin [batch, tokens, dim] as a model makes them: equal halves, positions apart for each sequence."""
    position = torch.arange(tokens)[None, :] + 13 * torch.arange(batch)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.cat([position[..., None] * frequency] * 2, dim=-1)
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


def laid_out(rand, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """[B, H, T, D]: dense, a view of a [B, T, H * D] projection, or a third of a stacked one."""
    batch, heads, tokens, dim = shape
    if layout == "dense":
        return rand(*shape, dtype=dtype)
    if layout == "transposed":
        return rand(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    return rand(batch, tokens, 3 * heads, dim, dtype=dtype)[:, :, heads : 2 * heads].transpose(1, 2)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_derived_bound_in_every_layout(rand, device, shape, dtype, layout, inverse):
    x = laid_out(rand, shape, layout, dtype)
    cos, sin = tables(shape[0] if layout != "dense" else 1, shape[2], shape[3], dtype, device)
    y = rope(x, cos, sin, inverse=inverse)
    sign = -1.0 if inverse else 1.0
    assert y.dtype == dtype
    assert y.shape == x.shape
    reference = plain(x.double(), cos.double(), sign * sin.double())
    assert_close("y", y, reference, plain(x, cos, sign * sin))


def pairs(x: Tensor) -> Tensor:
    """Cohere's order of a head's dims from the half-split one: places i and D/2 + i stand at 2i and 2i + 1."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 7, 14), 6), ((1, 2, 33, 96), 64), ((2, 1, 5, 80), 20)], ids=str)
def test_a_part_of_each_head(rand, device, same, shape, dim, dtype, layout, inverse):
    """The first dims as they would be turned alone, the others to the bit as they were."""
    x = laid_out(rand, shape, layout, dtype)
    cos, sin = tables(shape[0], shape[2], dim, dtype, device)
    y = rope(x, cos, sin, inverse=inverse)
    assert torch.equal(y[..., dim:], x[..., dim:])
    same(y[..., :dim], rope(x[..., :dim], cos, sin, inverse=inverse))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rest"), [((1, 1, 1, 2), 0), ((2, 3, 7, 14), 0), ((1, 9, 5, 64), 0), ((2, 3, 9, 20), 13)]
)
def test_pairs_are_halves_in_another_order(rand, device, same, shape, rest, dtype, layout, inverse):
    batch, heads, tokens, dim = shape
    x = laid_out(rand, (batch, heads, tokens, dim + rest), layout, dtype)
    cos, sin = tables(batch, tokens, dim, dtype, device)
    expected = rope(x, cos, sin, inverse=inverse)
    mixed = torch.cat([pairs(x[..., :dim]), x[..., dim:]], dim=-1)
    y = rope(mixed, pairs(cos), pairs(sin), interleaved=True, inverse=inverse)
    same(y[..., :dim], pairs(expected[..., :dim]))
    assert torch.equal(y[..., dim:], x[..., dim:])


def test_float32_tables_beside_bfloat16(rand, device):
    """OLMo 2: the tables keep their digits, and the result is rounded once."""
    x, (cos, sin) = rand(2, 3, 7, 64, dtype=torch.bfloat16), tables(2, 7, 64, torch.float32, device)
    once = plain(x.float(), cos, sin).to(torch.bfloat16)
    assert float((rope(x, cos, sin) != once).float().mean()) < 0.002
    assert float((rope(x, cos.bfloat16(), sin.bfloat16()) != once).float().mean()) > 0.05


def test_a_result_with_a_place_of_its_own_lies_like_a_projection(rand):
    ins = (rand(2, 3, 7, 64), rand(1, 1, 7, 64), rand(1, 1, 7, 64))
    for op in ("rope", "rope_bwd"):
        assert RULES.lower(node_of(op, ins, {})).order == {0: (0, 2, 1, 3)}


def test_heads_of_one_program_are_all_turned(rand, device, monkeypatch, same):
    """A program takes 4 heads when there are many tokens: 9 heads leave it one over."""
    monkeypatch.setattr(common, "rope_heads", lambda heads, tokens: 4)
    x = laid_out(rand, (2, 9, 5, 64), "transposed", torch.float32)
    cos, sin = tables(2, 5, 64, torch.float32, device)
    grouped = rope(x, cos, sin)
    monkeypatch.setattr(common, "rope_heads", lambda heads, tokens: 1)
    same(grouped, rope(x, cos, sin))


def test_inverse_is_the_gradient_even_where_the_halves_of_the_tables_differ(rand):
    x, dy, cos, sin = rand(2, 2, 5, 14), rand(2, 2, 5, 14), rand(2, 5, 14), rand(2, 5, 14)
    leaf = x.double().requires_grad_()
    (reference,) = torch.autograd.grad(plain(leaf, cos.double(), sin.double()), leaf, dy.double())
    leaf = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(plain(leaf, cos, sin), leaf, dy)
    assert_close("dx", rope(dy, cos, sin, inverse=True), reference, ours)
    assert_close("y", rope(x, cos, sin), plain(x.double(), cos.double(), sin.double()), plain(x, cos, sin))


def test_equals_transformers(rand, device):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = rand(2, 4, 9, 64), rand(2, 2, 9, 64)
    cos, sin = tables(2, 9, 64, torch.float32, device)
    for ours, theirs in zip((rope(q, cos, sin), rope(k, cos, sin)), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2.0**-21)


def test_equals_transformers_cohere(rand, device):
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb

    q, k = rand(2, 4, 9, 64), rand(2, 2, 9, 64)
    cos, sin = (pairs(table) for table in tables(2, 9, 64, torch.float32, device))
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    for ours, other in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(rope(ours, cos, sin, interleaved=True), other, rtol=0, atol=2.0**-21)


FACTORS = {"short_factor": (1.0, 1.5, 2.0, 2.5), "long_factor": (2.0, 3.0, 4.0, 5.0)}
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.3, "max_position_embeddings": 12},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 12, **FACTORS},
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens", [11, 12, 13, 40])
@pytest.mark.parametrize("kind", SCALINGS)
def test_tables_are_the_exact_backends(device, kind, tokens, interleaved):
    """Before, at and behind the number of tokens where dynamic and longrope change: there the device decides. Only a
    dynamic's power may be off by an ulp of torch's, which a position multiplies."""
    config = RopeConfig(rope_type=kind, **SCALINGS[kind])
    positions = torch.arange(tokens).expand(2, tokens).contiguous()
    positions[1] = positions[1].flip(0)
    attrs = {"rope": config, "head_dim": 8, "dtype": "float32", "interleaved": interleaved}
    expected = exact_tables(positions, **attrs)
    angles = angles_of(config, 8, positions)
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    true = [table[:, None] * config.attention_scaling for table in (angles.double().cos(), angles.double().sin())]
    made = apply("rope_tables", positions.to(device), **attrs)
    for name, ours, other, reference in zip(("cos", "sin"), made, expected, true, strict=True):
        if kind != "dynamic":
            assert_close(name, ours.cpu(), reference, other)
        else:
            torch.testing.assert_close(ours.cpu(), other, rtol=0, atol=tokens * 2.0**-22)


def angles_of(config: RopeConfig, head_dim: int, positions: Tensor) -> Tensor:
    """p f rounded to float32, as transformers rounds it."""
    return positions[..., None].float() * inverse_frequencies(config, head_dim, positions.max() + 1)


def turned_by_float64(positions: Tensor, device: str) -> None:
    config, head_dim = RopeConfig(rope_theta=500000.0), 64
    angles = torch.cat([angles_of(config, head_dim, positions)] * 2, dim=-1)[:, None]
    attrs = {"rope": config, "head_dim": head_dim, "dtype": "float32", "interleaved": False}
    cos, sin = apply("rope_tables", positions.to(device), **attrs)
    assert_close("cos", cos.cpu(), angles.double().cos(), angles.cos())
    assert_close("sin", sin.cpu(), angles.double().sin(), angles.sin())


def far_positions() -> Tensor:
    """Up to a million; of these the multiples of 355, which lie within 3e-5 of multiples of 113 pi."""
    drawn = torch.randint(0, 10**6, (1, 400), generator=torch.Generator().manual_seed(3))
    return torch.cat((drawn, 355 * torch.arange(1, 2800, 37)[None], torch.tensor([[0, 1, 10**6]])), dim=1)


def test_far_positions_are_as_exact_as_near_ones(device):
    turned_by_float64(far_positions(), device)


TABLE_MUTATIONS = {
    "half of pi in one part": {" - turns * HALF_PI_REST": ""},
    "reduced in float32": {"wide = angle.to(tl.float64)": "wide = angle"},
    "quarters not told apart": {"(quarter & 1) == 1": "quarter == 1"},
    "a term of the sine left out": {"-1.9515295891e-4 * z": "0.0 * z"},
    "one frequency for all": {"frequency[None, :]": "tl.max(frequency, axis=0)"},
}


@pytest.mark.parametrize("name", TABLE_MUTATIONS)
def test_a_wrong_table_fails(device, monkeypatch, tmp_path, name):
    monkeypatch.setattr(rules, "table_kernels", mutated(table_kernels, TABLE_MUTATIONS[name], tmp_path))
    assert fails(lambda: turned_by_float64(far_positions(), device))


@pytest.mark.parametrize("tokens", [13, 100, 5000])
def test_a_dynamic_ropes_frequencies_are_float64s(device, tokens):
    """f_i = theta(n)^(-2i / D), computed on the device in float64: the last position's angles show them."""
    factor, limit, dim = 3.3, 12, 16
    config = RopeConfig(rope_type="dynamic", factor=factor, max_position_embeddings=limit)
    stretch = factor * tokens / limit - (factor - 1)
    exponents = torch.arange(0, dim, 2).double() / dim
    base = (10000.0 ** -(exponents.float())).double()  # rounded as the host gives them
    frequencies = (base * stretch ** (-torch.arange(0, dim, 2).double() / (dim - 2))).float()
    angles = torch.cat([frequencies * (tokens - 1)] * 2)
    attrs = {"rope": config, "head_dim": dim, "dtype": "float32", "interleaved": False}
    cos, _ = apply("rope_tables", torch.tensor([[tokens - 1, 0]], device=device), **attrs)
    # An ulp of a frequency, which the host's own power may be off by, times the position.
    torch.testing.assert_close(cos[0, 0, 0].cpu().double(), angles.double().cos(), rtol=0, atol=tokens * 2.0**-23)


def test_one_launch_makes_tables_and_another_finds_the_length(device):
    for config, expected in (
        (RopeConfig(), ["rope_tables"]),
        (RopeConfig(rope_type="dynamic", **SCALINGS["dynamic"]), ["position_count", "rope_tables"]),
    ):
        run = immediate(torch.device(device))
        outs = (torch.empty(1, 1, 5, 8, device=device), torch.empty(1, 1, 5, 8, device=device))
        attrs = {"rope": config, "head_dim": 8, "dtype": "float32", "interleaved": False}
        rules.rope_tables(run, (torch.arange(5, device=device)[None],), outs, **attrs)
        assert [call.name for call in run.calls] == expected


def test_no_tokens(rand):
    assert rope(rand(2, 3, 0, 64), rand(1, 0, 64), rand(1, 0, 64)).shape == (2, 3, 0, 64)
