"""Matrix products with the operand order and strides that torch.autograd gives BLAS: the bits depend on both."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES

RULES.rule("linear")(torch.nn.functional.linear)


def rows(x):
    return x.reshape(-1, x.shape[-1])


@RULES.rule("linear_dx")
def linear_dx(dy, weight):
    return rows(dy).mm(weight).view(*dy.shape[:-1], weight.shape[1])


@RULES.rule("linear_dw")
def linear_dw(dy, x):
    return rows(dy).t().mm(rows(x))


@RULES.rule("bias_grad")
def bias_grad(dy):
    return rows(dy).sum(0)


@RULES.rule("conv1d")
def conv1d(x, weight, bias):
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


@RULES.rule("conv1d_dx")
def conv1d_dx(dy, weight):
    return rows(dy).mm(weight.t()).view(*dy.shape[:-1], -1)


@RULES.rule("conv1d_dw")
def conv1d_dw(dy, x):
    return rows(x).t().mm(rows(dy))


@RULES.rule("matmul")
def matmul(a, b):
    return torch.matmul(a, b)


def _batched(x):
    """[B, H, M, K] -> [B*H, M, K], a view where strides allow, as at::matmul folds it."""
    return x.reshape(-1, *x.shape[2:])


@RULES.rule("matmul_da")
def matmul_da(dy, a, b):
    return _batched(dy).bmm(_batched(b).transpose(1, 2)).view(a.shape)


@RULES.rule("matmul_db")
def matmul_db(dy, a, b):
    return _batched(a).transpose(1, 2).bmm(_batched(dy)).view(b.shape)


@RULES.rule("transpose_last")
def transpose_last(x):
    return x.transpose(-1, -2)
