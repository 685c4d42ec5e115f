"""aten calls of the elementwise ops, as torch.autograd makes them."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint32": torch.uint32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@RULES.rule("ones")
def ones(*, dtype):
    return torch.ones((), dtype=DTYPES[dtype])


RULES.rule("identity")(lambda x: x)
RULES.rule("copy")(torch.clone)
RULES.rule("add")(torch.add)
RULES.rule("sub")(torch.sub)
RULES.rule("mul")(torch.mul)
RULES.rule("div")(torch.div)
RULES.rule("scale_by")(torch.mul)
RULES.rule("divide_by")(torch.div)
RULES.rule("rsqrt")(torch.rsqrt)
RULES.rule("sign")(torch.sign)


@RULES.rule("_cast")
def cast(x, *, dtype):
    return x.to(DTYPES[dtype])


@RULES.rule("sum_to")
def sum_to(x, *, shape):
    """at::sum_to: leading dims and widened ones in one reduction."""
    lead = x.ndim - len(shape)
    dims = [*range(lead), *(i for i in range(lead, x.ndim) if shape[i - lead] == 1 and x.shape[i] != 1)]
    return x.sum(dims, keepdim=True).view(shape) if dims else x.view(shape)


@RULES.rule("scale")
def scale(x, *, factor):
    return x * factor


@RULES.rule("divide")
def divide(x, *, divisor):
    return x / divisor


@RULES.rule("power")
def power(x, *, exponent):
    return x.pow(exponent)


@RULES.rule("add_scalar")
def add_scalar(x, *, value):
    return x + value


@RULES.rule("clamp")
def clamp(x, *, low, high):
    return x.clamp(low, high)


@RULES.rule("square")
def square(x):
    return x.pow(2)


@RULES.rule("rsqrt_bwd")
def rsqrt_bwd(dy, y):
    return -0.5 * dy * y.pow(3)


@RULES.rule("reshape")
def reshape(x, *, shape):
    return x.reshape(shape)
