"""Which ops run as Triton kernels; the rest are aten calls, and the printed plan says so op by op."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native import attention as cpu_attention
from smedjan.backends.cuda_triton import glu, loss, norm, optimizer, rope
from smedjan.backends.torch_reference.table import RULES as ATEN
from smedjan.graph.lowering import RuleTable

RULES = RuleTable("cuda_triton", parent=ATEN)


@RULES.rule("rms_norm", label="triton rms_norm")
def rms_norm(x, weight, *, eps, weight_cast):
    return norm.rms_norm(x, weight, eps=eps, weight_cast=weight_cast)


@RULES.rule("rms_norm_bwd", label="triton rms_norm_bwd")
def rms_norm_bwd(x, weight, rstd, dy, acc, *, needs, eps, weight_cast):
    made = norm.rms_norm_bwd(x, weight, rstd, dy.contiguous(), acc, needs=needs, eps=eps, weight_cast=weight_cast)
    return _needed(made, needs)


def _needed(made, needs):
    kept = tuple(value for value, need in zip(made, needs, strict=True) if need)
    return kept[0] if len(kept) == 1 else kept


def _tables(cos, sin):
    return cos.squeeze(1), sin.squeeze(1)


@RULES.rule("rope", label="triton rope")
def rope_forward(x, cos, sin):
    return rope.rope(x, *_tables(cos, sin))


@RULES.rule("rope_bwd", label="triton rope")
def rope_backward(dy, cos, sin):
    return rope.rope(dy if dy.stride(-1) == 1 else dy.contiguous(), *_tables(cos, sin), inverse=True)


@RULES.rule("glu", label="triton glu")
def glu_forward(gate, up, *, act):
    return glu.glu(gate, up, act=act)


@RULES.rule("glu_bwd", label="triton glu_bwd")
def glu_backward(gate, up, dy, *, needs, act):
    return _needed(glu.glu_bwd(gate, up, dy, needs=needs, act=act), needs)


@RULES.rule("linear_cross_entropy", label="triton cross_entropy + aten mm")
def linear_cross_entropy(x, weight, labels, num_items, *, grads):
    needs = ("x" in grads, "w" in grads)
    total, dx, dweight = loss.linear_cross_entropy(x, weight, labels, num_items, needs=needs)
    none = weight.new_empty((0,))
    return total, none if dx is None else dx, none if dweight is None else dweight.to(weight.dtype)


@RULES.rule("global_norm", label="triton global_norm")
def global_norm(*grads):
    return optimizer.global_norm(*(grad.contiguous() for grad in grads))


@RULES.rule("adamw_update", label="triton adamw_update")
def adamw_update(param, grad, exp_avg, exp_avg_sq, lr, step, grad_scale, *, beta1, beta2, eps, weight_decay):
    optimizer.adamw_update(
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        bias_correction1=1.0 - beta1**step,
        bias_correction2=1.0 - beta2**step,
        grad_scale=grad_scale,
    )
    return param, exp_avg, exp_avg_sq


def attention(q, k, v, mask, *, causal, scale, implementation):
    """On CUDA, aten's efficient attention, which takes a mask and gives lse; key/value heads repeated."""
    k, v = _per_query_head(q, k), _per_query_head(q, v)
    y, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, _bias(mask, q), True, 0.0, causal, scale=scale
    )
    return y, lse[..., : q.shape[2]]


def attention_bwd(dy, q, k, v, mask, y, lse, *, causal, scale, implementation):
    """On CUDA, aten's backward wants its own padded lse and random state: the forward runs again under autograd."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        again = torch.nn.functional.scaled_dot_product_attention(
            leaves[0],
            _per_query_head(q, leaves[1]),
            _per_query_head(q, leaves[2]),
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
        )
    return torch.autograd.grad(again, leaves, dy)


def _per_query_head(q, kv):
    times = q.shape[1] // kv.shape[1]
    return kv if times == 1 else kv.repeat_interleave(times, dim=1)


def _bias(mask, q):
    if mask is None:
        return None
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return bias.expand(q.shape[0], q.shape[1], *bias.shape[2:])


if torch.cuda.is_available():
    RULES.rule("attention", label="aten efficient attention")(attention)
    RULES.rule("attention_bwd", label="aten attention, recomputed under autograd")(attention_bwd)
else:  # Triton's interpreter, on the CPU
    RULES.rule("attention", label=cpu_attention.LABEL)(cpu_attention.attention)
    RULES.rule("attention_bwd", label=cpu_attention.LABEL)(cpu_attention.attention_bwd)
