"""Sums of residuals, scales of logits and biases' gradients: SmolLM2-135M, Qwen3-0.6B, Llama-3-8B."""

from __future__ import annotations

from smedjan.backends.cuda_triton.examples.example import Example, array

SCALAR = array(dtype="float32")
HEADS = (0, 2, 1, 3)

EXAMPLES = [
    Example(op="add", name="bf16 8192 x 4096", ins=(array(8192, 4096), array(8192, 4096))),
    Example(
        op="add", name="f32 8192 x 576", ins=(array(8192, 576, dtype="float32"), array(8192, 576, dtype="float32"))
    ),
    Example(op="add", name="bf16 bias 8192 x 1024", ins=(array(8192, 1024), array(1024))),
    Example(op="add", name="bf16 of heads", ins=(array(4, 16, 2048, 128, order=HEADS), array(4, 16, 2048, 128))),
    Example(op="mul", name="bf16 8192 x 4096 by rows", ins=(array(8192, 4096), array(8192, 1))),
    Example(op="scale", name="bf16 8192 x 1024", ins=(array(8192, 1024),), attrs={"factor": 0.22}),
    Example(op="scale_by", name="bf16 8192 x 4096", ins=(array(8192, 4096), SCALAR)),
    Example(op="divide_by", name="f32 1", ins=(SCALAR, SCALAR)),
    Example(op="divide", name="bf16 2048 x 49152", ins=(array(2048, 49152),), attrs={"divisor": 8.0}),
    Example(op="power", name="bf16 8192 x 3072", ins=(array(8192, 3072),), attrs={"exponent": 3.0}),
    Example(op="rsqrt_bwd", name="f32 8192", ins=(array(8192, dtype="float32"), array(8192, dtype="float32"))),
    Example(op="_cast", name="bf16 8192 x 4096 to f32", ins=(array(8192, 4096),), attrs={"dtype": "float32"}),
    Example(
        op="_cast", name="f32 8192 x 576 to bf16", ins=(array(8192, 576, dtype="float32"),), attrs={"dtype": "bfloat16"}
    ),
    Example(
        op="div", name="f32 576 by columns", ins=(array(1536, 576, dtype="float32"), array(1536, 1, dtype="float32"))
    ),
    Example(op="sign", name="f32 1536 x 576", ins=(array(1536, 576, dtype="float32"),)),
    Example(
        op="clamp", name="f32 1536 x 576", ins=(array(1536, 576, dtype="float32"),), attrs={"low": -1.0, "high": 1.0}
    ),
    Example(op="copy", name="bf16 heads", ins=(array(4, 16, 2048, 128, order=HEADS),)),
    Example(op="sum_to", name="bf16 4 x 2048 x 1024 to a row", ins=(array(4, 2048, 1024),), attrs={"shape": (1024,)}),
    Example(
        op="sum_to", name="bf16 4 x 2048 x 1024 to a column", ins=(array(4, 2048, 1024),), attrs={"shape": (4, 2048, 1)}
    ),
    Example(op="bias_grad", name="bf16 8192 x 1024", ins=(array(8192, 1024),)),
    Example(op="bias_grad", name="bf16 8192 x 14336", ins=(array(8192, 14336),)),
    Example(op="bias_grad", name="f32 8192 x 576", ins=(array(8192, 576, dtype="float32"),)),
    Example(op="ones", name="f32", ins=(), attrs={"dtype": "float32"}),
]

EXPLAINED = {
    "add": "a bias is read again for each row, from the first cache",
    "mul": "a factor for a row or a column is read again for each tile, from the first cache",
    "clamp": "both ends in turn: the second launch reads and writes what the first one wrote",
}
