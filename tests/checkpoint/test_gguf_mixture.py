"""Every file type is `llama-quantize`'s: the same types for the same tensors, and the same bytes in them."""

import platform
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from smedjan.checkpoint.gguf_file import read_gguf
from smedjan.checkpoint.gguf_mixture import FILE_TYPES, is_seventy_billion, tensor_types
from smedjan.checkpoint.gguf_quantize import encode
from smedjan.checkpoint.gguf_write import OutTensor, write_gguf
from smedjan.checkpoint.raw import RawTensor
from tests.llama_cpp import quantize_file

Shapes = dict[str, tuple[int, ...]]


def model(layers: int, width: int = 256, *, fused: bool = False, tied: bool = False, thin: bool = False) -> Shapes:
    """Few rows: the mixture looks at names, layers and row lengths. `thin`: nothing but values and downs."""
    shapes: Shapes = {"token_embd.weight": (8, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (8, width)
    for layer in range(layers):
        names = ("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")
        for name in ("attn_v",) if thin else (*names, "attn_output", "ffn_gate", "ffn_up"):
            shapes[f"blk.{layer}.{name}.weight"] = (2, width)
        shapes[f"blk.{layer}.ffn_down.weight"] = (2, width + 64)
        shapes[f"blk.{layer}.attn_norm.weight"] = (width,)
        shapes[f"blk.{layer}.attn_q_norm.weight"] = (2, width)
        shapes[f"blk.{layer}.attn_q.bias"] = (2,)
    # One row is a vector to ggml.
    shapes["blk.0.ffn_gate.weight"] = (1, width)
    return shapes


def write(path: Path, architecture: str, values: dict[str, np.ndarray], layers: int, heads: tuple[int, int]) -> Path:
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.context_length": 64,
        f"{architecture}.embedding_length": 256,
        f"{architecture}.block_count": layers,
        f"{architecture}.feed_forward_length": 256,
        f"{architecture}.attention.head_count": heads[0],
        f"{architecture}.attention.head_count_kv": heads[1],
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.attention.layer_norm_epsilon": 1e-5,
        f"{architecture}.vocab_size": 8,
    }
    tensors = [
        OutTensor(
            name=name,
            quantization="F32",
            shape=each.shape,
            chunks=partial(encode, RawTensor.of(each), "F32", name=name),
        )
        for name, each in values.items()
    ]
    write_gguf(path, metadata, tensors)
    return path


CASES: dict[str, tuple[str, Shapes, int, tuple[int, int]]] = {
    "one layer": ("llama", model(1), 1, (8, 8)),
    "tied": ("llama", model(9, tied=True), 9, (8, 2)),
    "many layers": ("llama", model(30), 30, (8, 2)),
    "fused qkv": ("phi3", model(17, fused=True), 17, (8, 8)),
    "a 70B": ("llama", model(80, thin=True), 80, (8, 1)),
    "a 65B": ("llama", model(80, thin=True), 80, (8, 8)),
    "a Qwen2 72B": ("qwen2", model(80, thin=True), 80, (8, 8)),
    "rows of 192": ("llama", model(10, 192), 10, (8, 8)),
    "tied rows of 64": ("llama", model(3, 64, tied=True), 3, (8, 8)),
    "positions": ("gpt2", {**model(2, fused=True), "position_embd.weight": (8, 256)}, 2, (8, 8)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_the_file_is_llama_quantize_s(case: str, file_type: str, tmp_path: Path) -> None:
    architecture, shapes, layers, heads = CASES[case]
    rng = np.random.default_rng(layers)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    source = write(tmp_path / "f32.gguf", architecture, values, layers, heads)
    quantize_file(source, tmp_path / "theirs.gguf", file_type)
    theirs = read_gguf(tmp_path / "theirs.gguf").tensors
    types = tensor_types(
        shapes,
        file_type,
        block_count=layers,
        seventy_billion=is_seventy_billion(architecture, layers, *heads),
    )
    assert types == {name: tensor.quantization for name, tensor in theirs.items()}
    if platform.machine() in ("x86_64", "AMD64"):
        for name, tensor in theirs.items():
            mine = np.concatenate(list(encode(RawTensor.of(values[name]), types[name], name=name)))
            assert mine.tobytes() == bytes(tensor.data), name


def test_rows_that_no_block_divides_are_float16() -> None:
    """llama.cpp gives up on Q8_0 and Q4_0 here; for the others float16 is its own answer too."""
    shapes = {"token_embd.weight": (8, 48), "output.weight": (8, 48), "blk.0.attn_q.weight": (48, 48)}
    for file_type in ("Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"):
        assert set(tensor_types(shapes, file_type, block_count=1).values()) == {"F16"}


def test_the_order_of_tensors_does_not_matter() -> None:
    shapes = model(16)
    backwards = dict(reversed(shapes.items()))
    assert tensor_types(shapes, "Q4_K_M", block_count=16) == tensor_types(backwards, "Q4_K_M", block_count=16)
