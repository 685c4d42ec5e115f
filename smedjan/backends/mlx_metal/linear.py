"""Matrix products. Weights stay [out, in]: MLX passes the transpose to its gemm as a flag."""

from __future__ import annotations

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import wide
from smedjan.backends.mlx_metal.table import RULES


def rows(x: mx.array) -> mx.array:
    """[..., D] -> [N, D]"""
    return x.reshape(-1, x.shape[-1])


@RULES.rule("linear")
def linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


@RULES.rule("linear_dx")
def linear_dx(dy: mx.array, weight: mx.array) -> mx.array:
    return dy @ weight


@RULES.rule("linear_dx_add")
def linear_dx_add(acc: mx.array, dy: mx.array, weight: mx.array) -> mx.array:
    return mx.addmm(acc, dy, weight)


@RULES.rule("linear_dw")
def linear_dw(dy: mx.array, x: mx.array) -> mx.array:
    return rows(dy).T @ rows(x)


@RULES.rule("bias_grad")
def bias_grad(dy: mx.array) -> mx.array:
    return wide(rows(dy)).sum(axis=0).astype(dy.dtype)


@RULES.rule("conv1d")
def conv1d(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias, x, weight)


@RULES.rule("conv1d_dx")
def conv1d_dx(dy: mx.array, weight: mx.array) -> mx.array:
    return dy @ weight.T


@RULES.rule("conv1d_dw")
def conv1d_dw(dy: mx.array, x: mx.array) -> mx.array:
    return rows(x).T @ rows(dy)


@RULES.rule("matmul")
def matmul(a: mx.array, b: mx.array) -> mx.array:
    return a @ b


@RULES.rule("matmul_da")
def matmul_da(dy: mx.array, a: mx.array, b: mx.array) -> mx.array:
    return dy @ b.swapaxes(-1, -2)


@RULES.rule("matmul_db")
def matmul_db(dy: mx.array, a: mx.array, b: mx.array) -> mx.array:
    return a.swapaxes(-1, -2) @ dy


@RULES.rule("transpose_last")
def transpose_last(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)
