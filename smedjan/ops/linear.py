"""Matrix products. `linear` keeps torch's [out, in] weights: HF's layout, no transposes at load."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[0])
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Spec:
    """y = x W^T + b       x [..., I], W [O, I], b [O] -> y [..., O]. Products accumulate in float32."""
    require(weight.ndim == 2 and weight.shape[1] == x.shape[-1], f"linear: weight {weight.shape} for x {x.shape}")
    require(x.dtype == weight.dtype, f"linear: x is {x.dtype}, weight {weight.dtype}: cast first")
    require(bias is None or bias.shape == weight.shape[:1], "linear: bias does not fit the weight")
    return x.like(shape=(*x.shape[:-1], weight.shape[0]))


@linear.vjp
def _(dys, ins, outs, needs, acc):
    x, weight, _bias = ins
    return (
        linear_dx(dys[0], weight) if needs[0] else None,
        linear_dw(dys[0], x) if needs[1] else None,
        bias_grad(dys[0]) if needs[2] else None,
    )


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[1])
def linear_dx(dy: Tensor, weight: Tensor) -> Spec:
    """dx = dy W       dy [..., O], W [O, I] -> dx [..., I]"""
    return dy.like(shape=(*dy.shape[:-1], weight.shape[1]))


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[-1])
def linear_dw(dy: Tensor, x: Tensor) -> Spec:
    """dW = dy^T x over all rows       dy [..., O], x [..., I] -> dW [O, I]"""
    return x.like(shape=(dy.shape[-1], x.shape[-1]))


@op
def bias_grad(dy: Tensor) -> Spec:
    """db = sum of dy over all rows       dy [..., O] -> db [O]"""
    return dy.like(shape=dy.shape[-1:])


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[1])
def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Spec:
    """y = x W + b       x [..., I], W [I, O], b [O] -> y [..., O]: `linear` with GPT-2's transposed weight"""
    require(weight.ndim == 2 and weight.shape[0] == x.shape[-1], f"conv1d: weight {weight.shape} for x {x.shape}")
    require(bias is not None and bias.shape == weight.shape[1:], "conv1d: bias does not fit the weight")
    require(x.dtype == weight.dtype, f"conv1d: x is {x.dtype}, weight {weight.dtype}: cast first")
    return x.like(shape=(*x.shape[:-1], weight.shape[1]))


@conv1d.vjp
def _(dys, ins, outs, needs, acc):
    x, weight, _bias = ins
    return (
        conv1d_dx(dys[0], weight) if needs[0] else None,
        conv1d_dw(dys[0], x) if needs[1] else None,
        bias_grad(dys[0]) if needs[2] else None,
    )


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[0])
def conv1d_dx(dy: Tensor, weight: Tensor) -> Spec:
    """dx = dy W^T       dy [..., O], W [I, O] -> dx [..., I]"""
    return dy.like(shape=(*dy.shape[:-1], weight.shape[0]))


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[-1])
def conv1d_dw(dy: Tensor, x: Tensor) -> Spec:
    """dW = x^T dy over all rows       dy [..., O], x [..., I] -> dW [I, O]"""
    return x.like(shape=(x.shape[-1], dy.shape[-1]))


@op(cost=lambda node: 2 * node.outputs[0].numel * node.inputs[0].shape[-1])
def matmul(a: Tensor, b: Tensor) -> Spec:
    """y = a b       a [B, H, M, K], b [B, H, K, N] -> y [B, H, M, N]"""
    require(a.ndim == 4 == b.ndim and a.shape[:2] == b.shape[:2] and a.shape[3] == b.shape[2], f"matmul: {a} {b}")
    return a.like(shape=(*a.shape[:3], b.shape[3]))


@matmul.vjp
def _(dys, ins, outs, needs, acc):
    a, b = ins
    return (matmul_da(dys[0], a, b) if needs[0] else None, matmul_db(dys[0], a, b) if needs[1] else None)


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[-1])
def matmul_da(dy: Tensor, a: Tensor, b: Tensor) -> Spec:
    """da = dy b^T"""
    return a.like()


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[-1])
def matmul_db(dy: Tensor, a: Tensor, b: Tensor) -> Spec:
    """db = a^T dy"""
    return b.like()


@op
def transpose_last(x: Tensor) -> Spec:
    """Swaps the last two dims."""
    return x.like(shape=(*x.shape[:-2], x.shape[-1], x.shape[-2]))


@transpose_last.vjp
def _(dys, ins, outs, needs, acc):
    return (transpose_last(dys[0]),)
