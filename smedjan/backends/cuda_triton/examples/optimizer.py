"""Updates of real models: buckets of SmolLM2-135M, Qwen3-0.6B and Llama-3-8B, a few parameters of each kind."""

from __future__ import annotations

from math import prod
from typing import Any

from smedjan.backends.cuda_triton.examples.example import Example, array
from smedjan.ops.optimizer import BLOCK

SMOLLM2 = ((49152, 576), (576, 576), (192, 576), (1536, 576), (576,))
QWEN3 = ((151936, 1024), (2048, 1024), (3072, 1024), (1024, 3072), (1024,), (128,))
LLAMA3 = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))

ADAMW = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def _bucket(
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    *,
    param: str = "float32",
    grad: str = "bfloat16",
    moments: str = "float32",
    stochastic: tuple[bool, bool] = (False, False),
) -> Example:
    """One bucket, clipped. `param` float32 beside narrower gradients is a master."""
    narrow = grad if param != grad else ""
    eight_bit = moments == "uint8"
    lists: list[tuple[Any, ...]] = [tuple(array(*s, dtype=d) for s in shapes) for d in (param, grad, moments, moments)]
    if eight_bit:
        lists += [tuple(array(prod(shape) // BLOCK, dtype="float32") for shape in shapes)] * 2
    if narrow:
        lists.append(tuple(array(*shape, dtype=narrow) for shape in shapes))
    scalars = (1e-4, 10, 7 if any(stochastic) else None, array(dtype="float32"), array(dtype="float32"))
    attrs = {
        **ADAMW,
        "sites": tuple(range(len(shapes))),
        "eight_bit": eight_bit,
        "narrow": narrow,
        "stochastic": stochastic,
    }
    return Example(op="adamw_bucket", name=name, ins=(*(x for each in lists for x in each), *scalars), attrs=attrs)


EXAMPLES = [
    _bucket("f32 SmolLM2", SMOLLM2, grad="float32"),
    _bucket("master Qwen3", QWEN3),
    _bucket("master, bf16 state Qwen3", QWEN3, moments="bfloat16", stochastic=(False, True)),
    _bucket("bf16 Llama-3", LLAMA3, param="bfloat16", moments="bfloat16"),
    _bucket("bf16 stochastic Llama-3", LLAMA3, param="bfloat16", moments="bfloat16", stochastic=(True, True)),
    _bucket("master, 8-bit state Llama-3", LLAMA3, moments="uint8"),
    _bucket("bf16 stochastic, 8-bit Llama-3", LLAMA3, param="bfloat16", moments="uint8", stochastic=(True, False)),
    Example(
        op="norm_and_clip", name="bf16 Llama-3", ins=tuple(array(*shape) for shape in LLAMA3), attrs={"max_norm": 1.0}
    ),
    Example(
        op="norm_and_clip",
        name="f32 SmolLM2",
        ins=tuple(array(*shape, dtype="float32") for shape in SMOLLM2),
        attrs={"max_norm": 1.0},
    ),
    Example(
        op="global_norm", name="f32 SmolLM2", ins=tuple(array(*shape, dtype="float32") for shape in SMOLLM2), attrs={}
    ),
    Example(op="clip_coefficient", name="f32", ins=(array(dtype="float32"),), attrs={"max_norm": 1.0}),
    Example(
        op="keep",
        name="f32 1536 x 576",
        ins=(array(1536, 576, dtype="float32"), array(1536, 576, dtype="float32"), array(dtype="float32")),
        attrs={},
    ),
    Example(op="accumulate", name="bf16 14336 x 4096", ins=(array(14336, 4096), array(14336, 4096)), attrs={}),
    Example(
        op="accumulate",
        name="f32 1536 x 576",
        ins=(array(1536, 576, dtype="float32"), array(1536, 576, dtype="float32")),
        attrs={},
    ),
]

EXPLAINED = {
    "adamw_bucket": "8-bit codes are looked up in a table of 3 KB, which lies in the first cache: device memory moves "
    "its minimum",
}
