"""Which tensors of a GGUF file a model's parameters are, and how they lie there, both ways.

    copy       as in HF: matrices [out, in]
    pairs      rows of each head interleaved, (A, 2, D/2) -> (A, D/2, 2): llama.cpp turns neighbours, HF halves
    transpose  GPT-2's [in, out]
    heads      GPT-NeoX's fused rows (A, 3, D) -> (3, A, D)
    stack      a norm for each head -> [A, D]
    offset     Gemma's norms, which multiply by 1 + w: w + 1, rounded to float32

All but `offset` move elements and keep their bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from smedjan.checkpoint.gguf_arch import Architecture
from smedjan.models.decoder_config import DecoderConfig, Shape


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One tensor of the file, of `shape`, and the parameters that it holds; `heads` where its kind needs them."""

    name: str
    shape: Shape
    parameters: tuple[str, ...]
    kind: str = "copy"
    heads: int = 0

    def pack(self, parts: list[np.ndarray]) -> np.ndarray:
        """The tensor of its parameters' arrays, of any dtype but for `offset`: float32."""
        if self.kind == "stack":
            return np.stack(parts)
        (array,) = parts
        match self.kind:
            case "pairs":
                array = array.reshape(self.heads, 2, -1, *array.shape[1:]).swapaxes(1, 2)
            case "transpose":
                array = array.T
            case "heads":
                array = array.reshape(self.heads, 3, -1, *array.shape[1:]).swapaxes(0, 1)
            case "offset":
                array = array + np.float32(1)
        return np.ascontiguousarray(array).reshape(self.shape)

    def unpack(self, array: np.ndarray, index: int, shape: Shape) -> np.ndarray:
        """The array, of `shape`, of the parameter with this index."""
        match self.kind:
            case "stack":
                array = array[index]
            case "pairs":
                array = array.reshape(self.heads, -1, 2, *array.shape[1:]).swapaxes(1, 2)
            case "transpose":
                array = array.T
            case "heads":
                array = array.reshape(3, self.heads, -1, *array.shape[1:]).swapaxes(0, 1)
            case "offset":
                array = array - np.float32(1)
        return np.ascontiguousarray(array).reshape(shape)


def layouts(config: DecoderConfig, architecture: Architecture) -> list[Layout]:
    """Every tensor of the model, in the order of its parameters; a tied head where the architecture needs one."""
    shapes, names = config.parameter_shapes(), config.names
    made = [_whole("token_embd.weight", config.embedding, shapes)]
    if names.positions is not None:
        made.append(_whole("position_embd.weight", f"{names.positions}.weight", shapes))
    for layer in range(config.num_hidden_layers):
        for role in names.modules:
            stem = f"blk.{layer}.{architecture.stem(role)}"
            made.extend(_module(stem, names.module(layer, role), role, config, architecture, shapes))
    made.extend(_norm("output_norm", names.norm, config, shapes))
    if not config.tie_word_embeddings:
        made.append(_whole("output.weight", config.head, shapes))
    elif architecture.head == "own":
        made.append(_whole("output.weight", config.embedding, shapes))
    return made


def _whole(name: str, parameter: str, shapes: dict[str, Shape], kind: str = "copy", heads: int = 0) -> Layout:
    shape = shapes[parameter]
    return Layout(
        name=name,
        shape=tuple(reversed(shape)) if kind == "transpose" else shape,
        parameters=(parameter,),
        kind=kind,
        heads=heads,
    )


def _norm(stem: str, module: str, config: DecoderConfig, shapes: dict[str, Shape]) -> Iterator[Layout]:
    yield _whole(f"{stem}.weight", f"{module}.weight", shapes, "offset" if config.norm.offset else "copy")
    if f"{module}.bias" in shapes:
        yield _whole(f"{stem}.bias", f"{module}.bias", shapes)


def _module(
    stem: str, module: str, role: str, config: DecoderConfig, architecture: Architecture, shapes: dict[str, Shape]
) -> Iterator[Layout]:
    if role in ("q_norm", "k_norm") and config.qk_norm == "each":
        heads = config.num_attention_heads if role == "q_norm" else config.num_key_value_heads
        parts = tuple(f"{module}.norms.{head}.weight" for head in range(heads))
        yield Layout(name=f"{stem}.weight", shape=(heads, config.head_dim), parameters=parts, kind="stack")
        return
    if role.endswith(("_in", "_out", "_norm")):
        yield from _norm(stem, module, config, shapes)
        return
    kind, heads = "copy", 0
    if role in ("q", "k") and architecture.pairs and not config.interleaved:
        kind, heads = "pairs", config.num_attention_heads if role == "q" else config.num_key_value_heads
    elif role == "qkv" and config.qkv == "heads":
        kind, heads = "heads", config.num_attention_heads
    yield _whole(f"{stem}.weight", f"{module}.weight", shapes, "transpose" if config.conv1d else kind, heads)
    if f"{module}.bias" in shapes:
        yield _whole(f"{stem}.bias", f"{module}.bias", shapes, kind, heads)
