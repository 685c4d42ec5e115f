"""Gated MLPs: Llama-3-8B (14336), Qwen3-0.6B (3072), SmolLM2-135M (1536), Gemma 2 2B (9216)."""

from __future__ import annotations

from torch import Tensor

from smedjan.backends.cuda_triton.examples.example import Example, array

BOTH = (True, True)


def _halves(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """gate and up as one stacked projection leaves them."""
    gate, up = array(rows, 2 * width).chunk(2, dim=-1)
    return gate, up


def _wide(*shape: int) -> Tensor:
    return array(*shape, dtype="float32")


SILU, GELU, TANH = {"act": "silu"}, {"act": "gelu"}, {"act": "gelu_pytorch_tanh"}

EXAMPLES = [
    Example(op="glu", name="bf16 8192 x 14336", ins=(array(8192, 14336), array(8192, 14336)), attrs=SILU),
    Example(op="glu", name="bf16 8192 x 14336, halves", ins=_halves(8192, 14336), attrs=SILU),
    Example(op="glu", name="bf16 1 x 3072, halves", ins=_halves(1, 3072), attrs=SILU),
    Example(op="glu", name="f32 8192 x 1536", ins=(_wide(8192, 1536), _wide(8192, 1536)), attrs=SILU),
    Example(op="glu", name="bf16 8192 x 9216", ins=(array(8192, 9216), array(8192, 9216)), attrs=TANH),
    Example(op="glu", name="bf16 8192 x 3072 erf", ins=(array(8192, 3072), array(8192, 3072)), attrs=GELU),
    Example(
        op="glu_bwd",
        name="bf16 8192 x 14336",
        ins=(array(8192, 14336), array(8192, 14336), array(8192, 14336)),
        attrs={"needs": BOTH, **SILU},
    ),
    Example(
        op="glu_bwd",
        name="bf16 8192 x 14336, halves",
        ins=(*_halves(8192, 14336), array(8192, 14336)),
        attrs={"needs": BOTH, **SILU},
    ),
    Example(
        op="glu_bwd",
        name="bf16 8192 x 14336, gate alone",
        ins=(array(8192, 14336), array(8192, 14336), array(8192, 14336)),
        attrs={"needs": (True, False), **SILU},
    ),
    Example(
        op="glu_bwd",
        name="bf16 8192 x 14336, up alone",
        ins=(array(8192, 14336), array(8192, 14336), array(8192, 14336)),
        attrs={"needs": (False, True), **SILU},
    ),
    Example(
        op="glu_bwd",
        name="f32 8192 x 1536",
        ins=(_wide(8192, 1536), _wide(8192, 1536), _wide(8192, 1536)),
        attrs={"needs": BOTH, **SILU},
    ),
    Example(
        op="glu_bwd",
        name="bf16 8192 x 9216",
        ins=(array(8192, 9216), array(8192, 9216), array(8192, 9216)),
        attrs={"needs": BOTH, **TANH},
    ),
    Example(
        op="glu_bwd",
        name="bf16 8192 x 3072 erf",
        ins=(array(8192, 3072), array(8192, 3072), array(8192, 3072)),
        attrs={"needs": BOTH, **GELU},
    ),
]
