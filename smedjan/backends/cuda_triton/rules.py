"""Which ops run as Triton kernels; the rest are aten calls, and the printed plan says so op by op."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native import attention as cpu_attention
from smedjan.backends.cuda_triton import glu, loss, norm, optimizer, rope
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.torch_reference.table import RULES as ATEN
from smedjan.graph.lowering import RuleTable

RULES = RuleTable("cuda_triton", parent=ATEN)


@RULES.rule("rms_norm", label="triton rms_norm")
def rms_norm(x, weight, *, eps, weight_cast, offset):
    return norm.rms_norm(_rows(x), weight, eps=eps, weight_cast=weight_cast, offset=offset)


@RULES.rule("rms_norm_bwd", label="triton rms_norm_bwd")
def rms_norm_bwd(x, weight, rstd, dy, acc, *, needs, **attrs):
    waiting = None if acc is None else _rows(acc)
    return _needed(norm.rms_norm_bwd(_rows(x), weight, rstd, dy.contiguous(), waiting, needs=needs, **attrs), needs)


def _rows(x):
    """x as the kernel reads it: heads that were moved to the front are copied back into rows."""
    return x if x.is_contiguous() else x.contiguous()


def _narrow_enough(node):
    """Both sums over rows and a whole row stay in registers; wider ones are aten's."""
    return node.inputs[1].shape[0] <= common.MAX_FUSED_WIDTH


@RULES.rule("layer_norm", label="triton layer_norm", supports=_narrow_enough)
def layer_norm_forward(x, weight, bias, *, eps, composed):
    return norm.layer_norm(_rows(x), weight, bias, eps=eps)


@RULES.rule("layer_norm_bwd", label="triton layer_norm_bwd", supports=_narrow_enough)
def layer_norm_backward(x, weight, bias, mean, rstd, dy, *, needs, eps, composed):
    return _needed(norm.layer_norm_bwd(_rows(x), weight, mean, rstd, dy.contiguous(), needs=needs), needs)


def _needed(made, needs):
    kept = tuple(value for value, need in zip(made, needs, strict=True) if need)
    return kept[0] if len(kept) == 1 else kept


def _tables(cos, sin):
    return cos.squeeze(1), sin.squeeze(1)


def _heads(x):
    """The kernel reads a head's values one after the other."""
    return x if x.stride(-1) == 1 else x.contiguous()


@RULES.rule("rope_tables", label="aten, frequencies kept on the device")
def rope_tables(position_ids, **attrs):
    return rope.rope_tables(position_ids, **attrs)


@RULES.rule("rope", label="triton rope")
def rope_forward(x, cos, sin, *, interleaved, upcast):
    """In float32 whatever `upcast` says: it names roundings that only an exact backend reproduces."""
    return rope.rope(_heads(x), *_tables(cos, sin), interleaved=interleaved)


@RULES.rule("rope_bwd", label="triton rope")
def rope_backward(dy, cos, sin, *, interleaved, upcast):
    return rope.rope(_heads(dy), *_tables(cos, sin), interleaved=interleaved, inverse=True)


@RULES.rule("glu", label="triton glu")
def glu_forward(gate, up, *, act):
    return glu.glu(gate, up, act=act)


@RULES.rule("glu_bwd", label="triton glu_bwd")
def glu_backward(gate, up, dy, *, needs, act):
    return _needed(glu.glu_bwd(gate, up, dy, needs=needs, act=act), needs)


@RULES.rule("linear_cross_entropy", label="triton cross_entropy + aten mm")
def linear_cross_entropy(x, weight, labels, num_items, *, grads, scaling, divisor, cap):
    needs = ("x" in grads, "w" in grads)
    total, dx, dweight = loss.linear_cross_entropy(
        x, weight, labels, num_items, needs=needs, gain=scaling / divisor, cap=cap
    )
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


def attention(q, k, v, mask, *, causal, scale, implementation, cap, softmax_dtype):
    """On CUDA, aten's efficient attention, which takes a mask and gives lse; key/value heads repeated."""
    k, v = _per_query_head(q, k), _per_query_head(q, v)
    y, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, _bias(mask, q), True, 0.0, causal, scale=scale
    )
    return y, lse[..., : q.shape[2]]


def attention_bwd(dy, q, k, v, mask, y, lse, *, causal, scale, implementation, cap, softmax_dtype):
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


BIAS_ALIGNMENT = 8
"""Elements: what the strides of aten's efficient attention's bias must be multiples of."""


def _bias(mask, q):
    """0 and -inf, [B, H, T, S], its rows apart as that kernel wants them."""
    if mask is None:
        return None
    keys = mask.shape[-1]
    bias = q.new_zeros(*mask.shape[:-1], common.cdiv(keys, BIAS_ALIGNMENT) * BIAS_ALIGNMENT)[..., :keys]
    return bias.masked_fill_(mask.logical_not(), float("-inf")).expand(q.shape[0], q.shape[1], *mask.shape[2:])


if torch.cuda.is_available():
    RULES.rule("attention", label="aten efficient attention", supports=cpu_attention.uncapped)(attention)
    RULES.rule("attention_bwd", label="aten attention, recomputed under autograd", supports=cpu_attention.uncapped)(
        attention_bwd
    )
else:  # Triton's interpreter, on the CPU
    uncapped = cpu_attention.uncapped
    RULES.rule("attention", label=cpu_attention.LABEL, supports=uncapped)(cpu_attention.attention)
    RULES.rule("attention_bwd", label=cpu_attention.LABEL, supports=uncapped)(cpu_attention.attention_bwd)
