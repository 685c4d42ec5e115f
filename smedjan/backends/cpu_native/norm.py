"""rms_norm in three passes forward and four backward, statistics in float32 as declared; layer_norm is aten's."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native.table import RULES


def _gain(weight, offset):
    return weight.float() + offset if offset else weight.float()


@RULES.rule("rms_norm", label="cpu_native fused rms_norm")
def rms_norm(x, weight, *, eps, weight_cast, offset):
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = wide * rstd.unsqueeze(-1)
    if weight_cast == "before":
        return normed.to(x.dtype).mul_(weight), rstd
    return normed.mul_(_gain(weight, offset)).to(x.dtype), rstd


@RULES.rule("rms_norm_bwd", label="cpu_native fused rms_norm")
def rms_norm_bwd(x, weight, rstd, dy, acc, *, needs, eps, weight_cast, offset):
    wide, cotangent, scale = x.float(), dy.float(), rstd.unsqueeze(-1)
    made = []
    if needs[0]:
        g = cotangent * _gain(weight, offset)
        projection = torch.linalg.vecdot(g, wide).mul_(rstd.square()).div_(x.shape[-1]).unsqueeze(-1)
        dx = g.addcmul_(wide, projection, value=-1.0).mul_(scale).to(x.dtype)
        made.append(dx if acc is None else dx.add_(acc))
    if needs[1]:
        made.append((cotangent * wide).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype))
    return made[0] if len(made) == 1 else tuple(made)


@RULES.rule("layer_norm", label="aten native_layer_norm")
def layer_norm(x, weight, bias, *, eps, composed):
    """A float32 weight makes aten keep mean and rstd in float32, as the op declares, whatever x's dtype."""
    wide = None if bias is None else bias.float()
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight.float(), wide, eps)
    return y, mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


@RULES.rule("layer_norm_bwd", label="aten native_layer_norm_backward")
def layer_norm_bwd(x, weight, bias, mean, rstd, dy, acc, *, needs, eps, composed):
    made = torch.ops.aten.native_layer_norm_backward(
        dy, x, list(weight.shape), mean, rstd, weight.float(), None if bias is None else bias.float(), list(needs)
    )
    kept = [gradient.to(weight.dtype) for gradient, need in zip(made, needs, strict=True) if need]
    if acc is not None:
        kept[0].add_(acc)
    return kept[0] if len(kept) == 1 else tuple(kept)
