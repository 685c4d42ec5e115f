"""Linear layers in e4m3: of Qwen3-0.6B and Llama-3-8B."""

from __future__ import annotations

from smedjan.backends.cuda_triton.examples.example import Example, array

EXAMPLES = [
    Example(op="fp8_linear", name="8192 x 1024 to 3072", ins=(array(8192, 1024), array(3072, 1024)), attrs={}),
    Example(
        op="fp8_linear",
        name="8192 x 1024 to 2048, bias",
        ins=(array(8192, 1024), array(2048, 1024), array(2048)),
        attrs={},
    ),
    Example(op="fp8_linear", name="8192 x 4096 to 14336", ins=(array(8192, 4096), array(14336, 4096)), attrs={}),
    Example(op="fp8_linear", name="8192 x 14336 to 4096", ins=(array(8192, 14336), array(4096, 14336)), attrs={}),
    Example(
        op="fp8_linear_group",
        name="8192 x 1024 to 2048 + 1024 + 1024",
        ins=(array(8192, 1024), array(2048, 1024), array(1024, 1024), array(1024, 1024)),
        attrs={"biased": False},
    ),
]

WHY = (
    "cuBLAS takes FP8 arrays: x and the weight are read, written as bytes, read again by the product; "
    "rows that registers do not hold are read twice, for their largest magnitude first"
)
EXPLAINED = dict.fromkeys(("fp8_linear", "fp8_linear_group"), WHY)
