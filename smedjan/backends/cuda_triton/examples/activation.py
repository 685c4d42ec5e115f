"""MLPs without a gate (gpt2, gpt_neox, starcoder2, arcee) and the logits' softcap."""

from __future__ import annotations

from smedjan.backends.cuda_triton.examples.example import Example, array

INNER = array(8192, 3072)

EXAMPLES = [
    Example(op="gelu_new", name="bf16 8192 x 3072", ins=(INNER,)),
    Example(op="gelu_new_bwd", name="bf16 8192 x 3072", ins=(INNER, INNER)),
    Example(
        op="gelu_new_bwd",
        name="f32 1024 x 3072",
        ins=(array(1024, 3072, dtype="float32"), array(1024, 3072, dtype="float32")),
    ),
    Example(op="relu2", name="bf16 8192 x 18432", ins=(array(8192, 18432),)),
    Example(op="relu2_bwd", name="bf16 8192 x 18432", ins=(array(8192, 18432), array(8192, 18432))),
    Example(op="gelu", name="bf16 8192 x 3072", ins=(INNER,), attrs={"approximate": "none"}),
    Example(op="gelu_bwd", name="bf16 8192 x 3072", ins=(INNER, INNER), attrs={"approximate": "none"}),
    Example(op="silu", name="bf16 8192 x 3072", ins=(INNER,)),
    Example(op="silu_bwd", name="bf16 8192 x 3072", ins=(INNER, INNER)),
    Example(op="tanh", name="bf16 2048 x 256000", ins=(array(2048, 256000),)),
    Example(op="tanh_bwd", name="bf16 2048 x 256000", ins=(array(2048, 256000), array(2048, 256000))),
    Example(op="relu", name="bf16 8192 x 3072", ins=(INNER,)),
    Example(op="relu_bwd", name="bf16 8192 x 3072", ins=(INNER, INNER)),
]
