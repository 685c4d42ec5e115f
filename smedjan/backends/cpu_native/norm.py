"""rms_norm in three passes forward and four backward. Statistics in float32, as the op declares."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native.table import RULES


@RULES.rule("rms_norm", label="cpu_native fused rms_norm")
def rms_norm(x, weight, *, eps, weight_cast):
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = wide * rstd.unsqueeze(-1)
    if weight_cast == "before":
        return normed.to(x.dtype).mul_(weight), rstd
    return normed.mul_(weight.float()).to(x.dtype), rstd


@RULES.rule("rms_norm_bwd", label="cpu_native fused rms_norm")
def rms_norm_bwd(x, weight, rstd, dy, acc, *, needs, eps, weight_cast):
    wide, cotangent, scale = x.float(), dy.float(), rstd.unsqueeze(-1)
    made = []
    if needs[0]:
        g = cotangent * weight.float()
        projection = torch.linalg.vecdot(g, wide).mul_(rstd.square()).div_(x.shape[-1]).unsqueeze(-1)
        dx = g.addcmul_(wide, projection, value=-1.0).mul_(scale).to(x.dtype)
        made.append(dx if acc is None else dx.add_(acc))
    if needs[1]:
        made.append((cotangent * wide).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype))
    return made[0] if len(made) == 1 else tuple(made)
