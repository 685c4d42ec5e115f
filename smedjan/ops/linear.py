"""Matrix products. `linear` keeps torch's [out, in] weights: HF's layout, no transposes at load."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import add
from smedjan.ops.shape import concat, narrow


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


@op(cost=lambda node: 2 * node.inputs[1].numel * node.inputs[2].shape[1])
def linear_dx_add(acc: Tensor, dy: Tensor, weight: Tensor) -> Spec:
    """dx = acc + dy W, one rounding of the sum: `acc` is the cotangent that already waits there"""
    require(acc.shape == (*dy.shape[:-1], weight.shape[1]), f"linear_dx_add: acc {acc.shape} for dy {dy.shape}")
    return acc.like()


@linear_dx_add.decompose
def _(acc, dy, weight):
    return add(acc, linear_dx(dy, weight))


@op(donates=0, cost=lambda node: 2 * node.inputs[1].numel * node.inputs[2].shape[-1])
def linear_dw_add(total: Tensor, dy: Tensor, x: Tensor) -> Spec:
    """total += dy^T x, one rounding of the sum"""
    require(total.shape == (dy.shape[-1], x.shape[-1]), f"linear_dw_add: total {total.shape}")
    return total.like()


def members(tensors: tuple[Tensor, ...], biased: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The weights of a group, and the biases: None of each where there are none."""
    count = len(tensors) // 2 if biased else len(tensors)
    return tensors[:count], tensors[count:] if biased else (None,) * count


@op(cost=lambda node: 2 * node.inputs[0].numel * node.outputs[0].shape[-1])
def linear_group(x: Tensor, *tensors: Tensor, biased: bool = False) -> Spec:
    """y = concat over i of x W_i^T + b_i: several linear layers of one input as one product of stacked weights.

    tensors: the weights [O_i, I], then, where `biased`, the biases [O_i]; x [..., I] -> y [..., sum of O_i]
    """
    weights, biases = members(tensors, biased)
    require(all(w.ndim == 2 and w.shape[1] == x.shape[-1] and w.dtype == x.dtype for w in weights), "linear_group: W")
    require(all(b is None or b.shape == w.shape[:1] for w, b in zip(weights, biases, strict=True)), "linear_group: b")
    return x.like(shape=(*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


@linear_group.decompose
def _(x, *tensors, biased):
    weights, biases = members(tensors, biased)
    return concat(*(linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)), dim=-1)


@linear_group.vjp(takes_acc=(0,))
def group_gradients(dys, ins, outs, needs, acc, *, biased):
    x, *tensors = ins
    weights, _ = members(tuple(tensors), biased)
    count, sizes = len(weights), tuple(weight.shape[0] for weight in weights)
    wanted, wanted_biases = needs[1 : count + 1], needs[count + 1 :]
    dx = linear_group_dx(dys[0], acc[0], *weights) if needs[0] else None
    if all(wanted):
        dws = linear_group_dw(dys[0], x, sizes=sizes)
    else:
        dws = tuple(linear_dw(_piece(dys[0], sizes, i), x) if need else None for i, need in enumerate(wanted))
    if wanted_biases and all(wanted_biases):
        dbs = bias_group_grad(dys[0], sizes=sizes)
    else:
        dbs = tuple(bias_grad(_piece(dys[0], sizes, i)) if need else None for i, need in enumerate(wanted_biases))
    return dx, *dws, *dbs


def _piece(dy: Tensor, sizes: tuple[int, ...], index: int) -> Tensor:
    start = sum(sizes[:index])
    return narrow(dy, dim=dy.ndim - 1, start=start, size=sizes[index])


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[2].shape[1])
def linear_group_dx(dy: Tensor, acc: Tensor | None, *weights: Tensor) -> Spec:
    """dx = acc + sum over i of dy_i W_i, one rounding       dy [..., sum of O_i], W_i [O_i, I] -> dx [..., I]"""
    require(dy.shape[-1] == sum(weight.shape[0] for weight in weights), f"linear_group_dx: dy {dy.shape}")
    return dy.like(shape=(*dy.shape[:-1], weights[0].shape[1]))


@linear_group_dx.decompose
def _(dy, acc, *weights):
    sizes = tuple(weight.shape[0] for weight in weights)
    for index, weight in reversed(list(enumerate(weights))):
        dx = linear_dx(_piece(dy, sizes, index), weight)
        acc = dx if acc is None else add(acc, dx)
    return acc


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[-1])
def linear_group_dw(dy: Tensor, x: Tensor, *, sizes: tuple[int, ...]) -> tuple[Spec, ...]:
    """dW_i = dy_i^T x over all rows, i of `sizes` columns of dy each"""
    require(sum(sizes) == dy.shape[-1], f"linear_group_dw: {sizes} of dy {dy.shape}")
    return tuple(x.like(shape=(size, x.shape[-1])) for size in sizes)


@linear_group_dw.decompose
def _(dy, x, *, sizes):
    return tuple(linear_dw(_piece(dy, sizes, index), x) for index in range(len(sizes)))


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[-1])
def linear_group_dw_add(dy: Tensor, x: Tensor, *totals: Tensor) -> tuple[Spec, ...]:
    """total_i += dy_i^T x, one rounding of each sum"""
    require(sum(total.shape[0] for total in totals) == dy.shape[-1], f"linear_group_dw_add: dy {dy.shape}")
    return tuple(total.like() for total in totals)


@op
def bias_group_grad(dy: Tensor, *, sizes: tuple[int, ...]) -> tuple[Spec, ...]:
    """db_i = sum of dy_i over all rows"""
    return tuple(dy.like(shape=(size,)) for size in sizes)


@bias_group_grad.decompose
def _(dy, *, sizes):
    return tuple(bias_grad(_piece(dy, sizes, index)) for index in range(len(sizes)))


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
