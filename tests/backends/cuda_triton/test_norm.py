"""rms_norm, layer_norm and their gradients on Triton against float64 torch and transformers' own norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import common
from smedjan.errors import ShapeError
from tests.tolerances import UNIT_ROUNDOFF, assert_close

EPS = 1e-5
Gradients = tuple[Tensor | None, ...]


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, weight_cast: str = "before"
) -> tuple[Tensor, Tensor]:
    return apply("rms_norm", x, weight, eps=eps, offset=offset, weight_cast=weight_cast)


def at_places(made: Tensor | tuple[Tensor, ...], needs: tuple[bool, ...]) -> Gradients:
    found = iter(made if isinstance(made, tuple) else (made,))
    return tuple(next(found) if need else None for need in needs)


def rms_norm_bwd(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dy: Tensor,
    acc: Tensor | None = None,
    *,
    needs: tuple[bool, bool],
    eps: float,
    offset: float = 0.0,
    weight_cast: str = "before",
) -> Gradients:
    attrs = {"eps": eps, "offset": offset, "weight_cast": weight_cast}
    return at_places(apply("rms_norm_bwd", x, weight, rstd, dy, acc, needs=needs, **attrs), needs)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return apply("layer_norm", x, weight, bias, eps=eps)


def layer_norm_bwd(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    acc: Tensor | None = None,
    *,
    needs: tuple[bool, bool, bool],
    bias: Tensor | None = None,
) -> Gradients:
    """A bias's gradient does not depend on the bias: the weight stands in."""
    ins = (x, weight, weight if bias is None else bias, mean, rstd, dy, acc)
    return at_places(apply("layer_norm_bwd", *ins, needs=needs, eps=EPS, composed=False), needs)


SHAPES = [(1, 7), (5, 33), (3, 96), (17, 128), (2, 3, 576), (4, 1536), (1, 1)]
CASTS = [("before", 0.0), ("after", 0.0), ("after", 1.0)]
CASES = [(dtype, *cast) for dtype in (torch.float32, torch.bfloat16) for cast in CASTS] + [
    (torch.float16, "before", 0.0)
]


def plain(x: Tensor, weight: Tensor, offset: float, cast: str) -> Tensor:
    """Llama's (before) or Gemma's (after) norm, in x's dtype; in float64 the two are the same."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if cast == "before":
        return (offset + weight) * normal.to(x.dtype) if offset else weight * normal.to(x.dtype)
    return (normal * (offset + weight.to(wide.dtype))).to(x.dtype)


def gradients(x: Tensor, weight: Tensor, dy: Tensor, acc: Tensor | None, offset: float, cast: str) -> list[Tensor]:
    """Those of torch.autograd, in the dtype of its arguments, with acc added to x's."""
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    dx, dw = torch.autograd.grad(plain(*leaves, offset, cast), leaves, dy)
    return [dx if acc is None else acc + dx, dw]


def wide(*tensors: Tensor | None) -> list[Tensor]:
    return [None if tensor is None else tensor.double() for tensor in tensors]  # type: ignore[misc]


@pytest.mark.parametrize(("dtype", "cast", "offset"), CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_are_within_the_derived_bound(rand, shape, dtype, cast, offset):
    x, weight = rand(*shape, dtype=dtype, scale=3.0), rand(shape[-1], dtype=dtype)
    dy, acc = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype)
    y, rstd = rms_norm(x, weight, eps=EPS, offset=offset, weight_cast=cast)
    assert y.dtype == dtype
    assert rstd.dtype == torch.float32
    assert rstd.shape == shape[:-1]
    assert_close("y", y, plain(*wide(x, weight), offset, cast), plain(x, weight, offset, cast))
    rstd64 = torch.rsqrt(x.double().pow(2).mean(-1) + EPS)
    assert_close("rstd", rstd, rstd64, torch.rsqrt(x.float().pow(2).mean(-1) + EPS))

    options = {"eps": EPS, "offset": offset, "weight_cast": cast}
    got = rms_norm_bwd(x, weight, rstd, dy, acc, needs=(True, True), **options)
    reference = gradients(*wide(x, weight, dy, acc), offset, cast)
    ours = gradients(x, weight, dy, acc, offset, cast)
    # In a row of one value the terms of dx, rstd * g and its projection, cancel: roundings are relative to them.
    term = (rstd64[..., None] * dy.double() * (offset + weight.double())).abs().max()
    assert_close("dx", got[0], reference[0], ours[0], scale=max(float(term), float(reference[0].abs().max())))
    assert_close("dw", got[1], reference[1], ours[1])


def test_each_gradient_alone_has_the_bits_of_both_together(rand, same):
    x, weight, dy, acc = rand(6, 96), rand(96), rand(6, 96), rand(6, 96)
    _, rstd = rms_norm(x, weight, eps=EPS)
    dx, dw = rms_norm_bwd(x, weight, rstd, dy, acc, needs=(True, True), eps=EPS)
    only_dx = rms_norm_bwd(x, weight, rstd, dy, acc, needs=(True, False), eps=EPS)
    only_dw = rms_norm_bwd(x, weight, rstd, dy, needs=(False, True), eps=EPS)
    assert only_dx[1] is None
    assert only_dw[0] is None
    same(only_dx[0], dx)
    same(only_dw[1], dw)


def test_without_acc_dx_is_the_gradient_alone(rand):
    x, weight, dy = rand(3, 33), rand(33), rand(3, 33)
    _, rstd = rms_norm(x, weight, eps=EPS)
    alone, _ = rms_norm_bwd(x, weight, rstd, dy, needs=(True, True), eps=EPS)
    added, _ = rms_norm_bwd(x, weight, rstd, dy, torch.ones_like(x), needs=(True, True), eps=EPS)
    torch.testing.assert_close(added, alone + 1.0, rtol=0, atol=2e-6)


@pytest.mark.parametrize("programs", [2, 40])
def test_every_row_is_summed_once(rand, monkeypatch, programs):
    """Programs that take many tiles each, and more programs than the second stage reads at a time."""
    monkeypatch.setattr(common, "MAX_PROGRAMS", programs)
    x, weight, dy = rand(45, 1030), rand(1030), rand(45, 1030)
    assert common.row_programs(45, common.norm_bwd_tile(1030)) == programs
    _, rstd = rms_norm(x, weight, eps=EPS)
    got = rms_norm_bwd(x, weight, rstd, dy, needs=(True, True), eps=EPS)
    reference = gradients(*wide(x, weight, dy, None), 0.0, "before")
    for name, value, true, ours in zip(
        ("dx", "dw"), got, reference, gradients(x, weight, dy, None, 0.0, "before"), strict=True
    ):
        assert_close(name, value, true, ours)


def test_rows_too_wide_for_one_kernel_take_a_second_for_dw(rand, monkeypatch, same):
    monkeypatch.setattr(common, "MAX_FUSED_WIDTH", 128)
    monkeypatch.setattr(common, "MAX_WIDE_PROGRAMS", 1)
    width = 133
    x, weight, dy = rand(35, width), rand(width), rand(35, width)
    _, rstd = rms_norm(x, weight, eps=EPS)
    got = rms_norm_bwd(x, weight, rstd, dy, needs=(True, True), eps=EPS)
    reference = gradients(*wide(x, weight, dy, None), 0.0, "before")
    for name, value, true, ours in zip(
        ("dx", "dw"), got, reference, gradients(x, weight, dy, None, 0.0, "before"), strict=True
    ):
        assert_close(name, value, true, ours)
    only_dw = rms_norm_bwd(x, weight, rstd, dy, needs=(False, True), eps=EPS)
    same(only_dw[1], got[1])


def test_rows_may_lie_apart(rand, same):
    stacked = rand(5, 3 * 33)
    x, dy, weight = stacked[:, :33], stacked[:, 66:], rand(33)
    y, rstd = rms_norm(x, weight, eps=EPS)
    dense_y, dense_rstd = rms_norm(x.contiguous(), weight, eps=EPS)
    same(y, dense_y)
    strided = rms_norm_bwd(x, weight, rstd, dy, stacked[:, 33:66], needs=(True, True), eps=EPS)
    acc = stacked[:, 33:66].contiguous()
    options = {"needs": (True, True), "eps": EPS}
    dense = rms_norm_bwd(x.contiguous(), weight, dense_rstd, dy.contiguous(), acc, **options)
    same(strided[0], dense[0])
    same(strided[1], dense[1])


def test_no_rows(rand):
    x, weight = rand(0, 33), rand(33)
    y, rstd = rms_norm(x, weight, eps=EPS)
    dx, dw = rms_norm_bwd(x, weight, rstd, x, needs=(True, True), eps=EPS)
    assert y.shape == dx.shape == (0, 33)
    assert torch.equal(dw, torch.zeros(33, device=x.device))


def test_a_zero_row_gives_zeros_and_a_large_one_does_not_overflow(rand):
    x = torch.zeros(2, 33, device=rand(1).device)
    x[1] = 1e18
    weight = rand(33)
    y, rstd = rms_norm(x, weight, eps=EPS)
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    torch.testing.assert_close(y[1], weight)
    dx, _ = rms_norm_bwd(x, weight, rstd, x, needs=(True, False), eps=EPS)
    assert bool(dx.isfinite().all())


def test_bfloat16_rounds_where_transformers_does(rand):
    """Against transformers' own modules: equal, but for the last bit of a reciprocal square root on a device."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = rand(16, 576, dtype=torch.bfloat16), rand(576, dtype=torch.bfloat16)
    for cast, offset, module in (("before", 0.0, LlamaRMSNorm(576, EPS)), ("after", 1.0, GemmaRMSNorm(576, EPS))):
        module = module.to(x.device, torch.bfloat16)
        module.weight.data.copy_(weight)
        y, _ = rms_norm(x, weight, eps=EPS, offset=offset, weight_cast=cast)
        other, _ = rms_norm(x, weight + offset, eps=EPS, weight_cast="after" if cast == "before" else "before")
        assert float((y != module(x)).float().mean()) < 0.002
        assert float((other != module(x)).float().mean()) > 0.05, "the two casts are not told apart"


def test_a_row_that_does_not_fit_is_an_error_that_says_so(rand):
    width = common.MAX_WIDTH + 1
    with pytest.raises(ShapeError, match="torch_reference"):
        rms_norm(rand(1, width), rand(width), eps=EPS)


def layer_gradients(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """torch's, with float32 inside whatever the dtype: torch's own bfloat16 keeps its mean in bfloat16."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    wide = [leaf if leaf.dtype == torch.float64 else leaf.float() for leaf in leaves]
    y = torch.nn.functional.layer_norm(wide[0], weight.shape, wide[1], wide[2], EPS).to(x.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", [0.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_layer_norm_is_within_the_derived_bound(rand, shape, level, dtype):
    """`level`: of the mean, which a variance of E[x^2] - mean^2 would not survive."""
    x = (rand(*shape) + level).to(dtype)
    weight, bias, dy = rand(shape[-1], dtype=dtype), rand(shape[-1], dtype=dtype), rand(*shape, dtype=dtype)
    y, mean, rstd = layer_norm(x, weight, bias, eps=EPS)
    assert y.dtype == dtype
    assert mean.dtype == rstd.dtype == torch.float32
    assert mean.shape == rstd.shape == shape[:-1]
    got = (y, *layer_norm_bwd(x, weight, mean, rstd, dy, needs=(True, True, True)))
    reference = layer_gradients(*wide(x, weight, bias, dy))
    ours = layer_gradients(x, weight, bias, dy)
    # n is of x - mean, whose float32 mean is rounded: what a level adds to the error, it adds to torch's as well, of
    # which a small tensor holds a few draws. dx is a difference of terms of the size of rstd * g.
    spread = x.double().std(-1, correction=0).min() if shape[-1] > 1 else x.new_ones((), dtype=torch.float64)
    size = 1.0 + level / float(spread) * UNIT_ROUNDOFF[torch.float32] / UNIT_ROUNDOFF[dtype]
    term = (rstd[..., None].double() * dy.double() * weight.double()).abs().max()
    for name, value, true, plain in zip(("y", "dx", "dw", "db"), got, reference, ours, strict=True):
        largest = max(float(true.abs().max()), float(term) if name == "dx" else 0.0)
        assert_close(name, value, true, plain, scale=largest * size)


def test_layer_norm_without_a_bias_is_transformers_cohere_norm(rand):
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    x, weight = rand(16, 576, dtype=torch.bfloat16), rand(576, dtype=torch.bfloat16)
    module = CohereLayerNorm(576, EPS).to(x.device, torch.bfloat16)
    module.weight.data.copy_(weight)
    y, _, _ = layer_norm(x, weight, None, eps=EPS)
    assert float((y != module(x)).float().mean()) < 0.002


def test_each_gradient_of_layer_norm_alone_has_the_bits_of_all_together(rand, same):
    x, weight, dy = rand(6, 96), rand(96), rand(6, 96)
    _, mean, rstd = layer_norm(x, weight, None, eps=EPS)
    together = layer_norm_bwd(x, weight, mean, rstd, dy, needs=(True, True, True))
    for place in range(3):
        needs = tuple(place == other for other in range(3))
        alone = layer_norm_bwd(x, weight, mean, rstd, dy, needs=needs)
        same(alone[place], together[place])
        assert all(value is None for other, value in enumerate(alone) if other != place)


def test_every_row_of_a_layer_norm_is_summed_once(rand, monkeypatch):
    monkeypatch.setattr(common, "MAX_PROGRAMS", 2)
    check_every_row_of_a_layer_norm(rand, 45, 1030)


def test_rows_of_a_layer_norm_too_wide_for_one_kernel_take_a_second_for_dw_and_db(rand, monkeypatch):
    monkeypatch.setattr(common, "MAX_FUSED_WIDTH", 128)
    monkeypatch.setattr(common, "MAX_WIDE_PROGRAMS", 1)
    check_every_row_of_a_layer_norm(rand, 35, 133)


def check_every_row_of_a_layer_norm(rand, rows: int, width: int) -> None:
    x, weight, dy = rand(rows, width), rand(width), rand(rows, width)
    _, mean, rstd = layer_norm(x, weight, None, eps=EPS)
    got = layer_norm_bwd(x, weight, mean, rstd, dy, needs=(True, True, True))
    reference, ours = (layer_gradients(*f(x, weight, torch.zeros_like(weight), dy)) for f in (wide, lambda *t: t))
    for name, value, true, plain in zip(("dx", "dw", "db"), got, reference[1:], ours[1:], strict=True):
        assert_close(name, value, true, plain)


def test_rows_of_a_layer_norm_may_lie_apart(rand, same):
    stacked = rand(5, 2 * 33)
    x, dy, weight, bias = stacked[:, :33], stacked[:, 33:], rand(33), rand(33)
    made, dense = layer_norm(x, weight, bias, eps=EPS), layer_norm(x.contiguous(), weight, bias, eps=EPS)
    needs = (True, True, True)
    back = layer_norm_bwd(x, weight, *made[1:], dy, needs=needs)
    for ours, other in zip(
        (*made, *back),
        (*dense, *layer_norm_bwd(x.contiguous(), weight, *dense[1:], dy.contiguous(), needs=needs)),
        strict=True,
    ):
        same(ours, other)


def test_layer_norm_of_no_rows(rand):
    x, weight = rand(0, 33), rand(33)
    y, mean, rstd = layer_norm(x, weight, weight, eps=EPS)
    dx, dw, db = layer_norm_bwd(x, weight, mean, rstd, x, needs=(True, True, True))
    assert y.shape == dx.shape == (0, 33)
    assert torch.equal(dw, torch.zeros_like(weight))
    assert torch.equal(db, dw)
    assert db.data_ptr() != dw.data_ptr(), "a caller may write to one of them"
