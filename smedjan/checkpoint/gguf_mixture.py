"""Which type each tensor of a GGUF file gets: llama.cpp's mixtures, by the tensors' GGUF names and shapes.

A file type such as Q4_K_M names a default and its exceptions: matrices that hurt more when coarse get more bits, rows
that are no whole number of blocks get a type with smaller blocks, vectors, norms and position tables stay float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_DEFAULTS = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q4_0": "Q4_0",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
}
FILE_TYPES: tuple[str, ...] = tuple(_DEFAULTS)
"""The file types that are written, by llama.cpp's names."""

# The type with smaller blocks where a row is no multiple of 256; F16 where it is no multiple of 32 either.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_ATTN_V = re.compile(r"blk\.\d+\.attn_(v|qkv)\.weight")
_FFN_DOWN = re.compile(r"blk\.\d+\.ffn_down\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")


def tensor_types(
    shapes: Mapping[str, tuple[int, ...]],
    file_type: str,
    *,
    block_count: int,
    seventy_billion: bool = False,
) -> dict[str, str]:
    """GGUF tensor name -> type, for shapes outermost first.

    `seventy_billion`: llama.cpp calls the model a 70B, whose few values heads get more bits (see `is_seventy_billion`).
    """
    assert file_type in _DEFAULTS, file_type
    order = sorted(shapes, key=lambda name: int(found[1]) if (found := _LAYER.match(name)) else -1)
    values = [name for name in order if _ATTN_V.fullmatch(name)]
    downs = [name for name in order if _FFN_DOWN.fullmatch(name)]
    types: dict[str, str] = {}
    for name, shape in shapes.items():
        kind = _DEFAULTS[file_type]
        if not _is_matrix(name, shape):
            types[name] = "F32"
            continue
        if name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in shapes):
            kind = _output_type(kind, shape)
        elif name in values:
            kind = _value_type(file_type, values.index(name), len(values), seventy_billion)
        elif name in downs:
            kind = _down_type(file_type, downs.index(name), block_count)
        types[name] = _fitting(kind, shape)
    return types


def is_seventy_billion(architecture: str, block_count: int, head_count: int, head_count_kv: int) -> bool:
    """Whether llama.cpp takes this model for one of those whose values heads are shared by eight queries."""
    if architecture == "llama":
        return block_count == 80 and head_count != head_count_kv
    return architecture in ("qwen2", "olmo") and block_count == 80


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    # ggml does not count outer dimensions of 1.
    rank = next((len(shape) - at for at, size in enumerate(shape) if size != 1), 1)
    return (
        rank > 1
        and name.endswith("weight")
        and not name.endswith("_norm.weight")
        and name not in ("position_embd.weight", "token_types.weight")
    )


def _more_bits(index: int, count: int) -> bool:
    """The first and the last eighth, and every third layer between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _output_type(kind: str, shape: tuple[int, ...]) -> str:
    if kind in ("F32", "F16", "BF16"):
        return kind
    if kind == "Q8_0" or shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        return "Q8_0"
    return "Q6_K"


def _value_type(file_type: str, index: int, count: int, seventy_billion: bool) -> str:
    kind = _DEFAULTS[file_type]
    if file_type in ("Q4_K_M", "Q5_K_M") and _more_bits(index, count):
        kind = "Q6_K"
    elif file_type == "Q4_K_S" and index < 4:
        kind = "Q5_K"
    return "Q5_K" if seventy_billion and kind == "Q4_K" else kind


def _down_type(file_type: str, index: int, block_count: int) -> str:
    if file_type in ("Q4_K_M", "Q5_K_M") and _more_bits(index, block_count):
        return "Q6_K"
    if file_type == "Q4_K_S" and index < block_count // 8:
        return "Q5_K"
    return _DEFAULTS[file_type]


def _fitting(kind: str, shape: tuple[int, ...]) -> str:
    for candidate in (kind, _FALLBACK.get(kind, kind)):
        if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[candidate]][0] == 0:
            return candidate
    return "F16"
