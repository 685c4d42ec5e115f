"""Norms of SmolLM2-135M, Qwen3-0.6B, Llama-3-8B and GPT-2, and the widest that the kernels hold: Llama-3-405B's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from smedjan.backends.cuda_triton.examples.example import Example, array

ROWS = 8192
LLAMA = {"eps": 1e-5, "weight_cast": "before", "offset": 0.0}
GEMMA = {"eps": 1e-6, "weight_cast": "after", "offset": 1.0}
HEADS = (0, 2, 1, 3)


def _x(width: int, dtype: str) -> Any:
    return array(ROWS, width, dtype=dtype)


def _stat() -> Any:
    return array(ROWS, dtype="float32")


def _rms(width: int, dtype: str, short: str, attrs: dict[str, Any] = LLAMA) -> Iterator[Example]:
    x, weight = _x(width, dtype), array(width, dtype=dtype)
    name = f"{short} {ROWS} x {width}" + (" (1 + w)" if attrs is GEMMA else "")
    yield Example(op="rms_norm", name=name, ins=(x, weight), attrs=attrs)
    yield Example(op="add_rms_norm", name=name, ins=(x, x, weight), attrs={**attrs, "factor": 1.0})
    for needs, waits in (((True, True), True), ((True, False), True), ((True, True), False)):
        wanted = "".join((" acc" if waits else "", " dx" if needs[0] else "", " dw" if needs[1] else ""))
        ins = (x, weight, _stat(), x, x if waits else None)
        yield Example(op="rms_norm_bwd", name=name + wanted, ins=ins, attrs={**attrs, "needs": needs})


def _layer(width: int, dtype: str, short: str, *, biased: bool) -> Iterator[Example]:
    x, weight = _x(width, dtype), array(width, dtype=dtype)
    bias = array(width, dtype=dtype) if biased else None
    attrs = {"eps": 1e-5, "composed": False}
    name = f"{short} {ROWS} x {width}{' bias' if biased else ''}"
    yield Example(op="layer_norm", name=name, ins=(x, weight, bias), attrs=attrs)
    yield Example(op="add_layer_norm", name=name, ins=(x, x, weight, bias), attrs={**attrs, "factor": 1.0})
    for needs, waits in (((True, True, biased), True), ((True, False, False), True)):
        wanted = " acc dx" + (" dw" if needs[1] else "") + (" db" if needs[2] else "")
        ins = (x, weight, bias, _stat(), _stat(), x, x if waits else None)
        yield Example(op="layer_norm_bwd", name=name + wanted, ins=ins, attrs={**attrs, "needs": needs})


def _heads() -> Iterator[Example]:
    """Qwen3-0.6B's queries, where a rope is not fused with their norm."""
    q, weight = array(4, 16, 2048, 128, order=HEADS), array(128)
    yield Example(op="rms_norm", name="bf16 4 x 16 x 2048 x 128 of heads", ins=(q, weight), attrs=LLAMA)
    ins = (q, weight, array(4, 16, 2048, dtype="float32"), array(4, 16, 2048, 128), None)
    attrs = {**LLAMA, "needs": (True, True)}
    yield Example(op="rms_norm_bwd", name="bf16 4 x 16 x 2048 x 128 of heads dx dw", ins=ins, attrs=attrs)


EXAMPLES = [
    *_rms(576, "bfloat16", "bf16"),
    *_rms(1024, "bfloat16", "bf16"),
    *_rms(2048, "bfloat16", "bf16", GEMMA),
    *_rms(4096, "bfloat16", "bf16"),
    *_rms(8192, "bfloat16", "bf16"),
    *_rms(16384, "bfloat16", "bf16"),
    *_rms(576, "float32", "f32"),
    *_rms(16384, "float32", "f32"),
    *_layer(768, "bfloat16", "bf16", biased=True),
    *_layer(8192, "bfloat16", "bf16", biased=False),
    *_layer(8192, "float32", "f32", biased=True),
    *_layer(16384, "bfloat16", "bf16", biased=True),
    *_heads(),
]

EXPLAINED = {
    "rms_norm": "the weight (and bias) is read by every program, from the first cache",
    "add_rms_norm": "the weight (and bias) is read by every program, from the first cache",
    "layer_norm": "the weight (and bias) is read by every program, from the first cache",
    "add_layer_norm": "the weight (and bias) is read by every program, from the first cache",
    "rms_norm_bwd": (
        "the weight (and bias) is read by every program, from the first cache; rows' shares of the weight's "
        "gradient are summed in a second launch"
    ),
    "layer_norm_bwd": (
        "the weight (and bias) is read by every program, from the first cache; rows' shares of the weight's "
        "and bias's gradients are summed in a second launch"
    ),
}
