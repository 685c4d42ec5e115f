"""What a decoder is, in attributes: the one configuration that every family's `config.json` is read into.

V vocab_size, H hidden_size, I intermediate_size, A attention heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smedjan.ops.rope import RopeConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block's attention: its rotary positions (None: it has none), its window in tokens, the scores' factor."""

    rope: RopeConfig | None
    scale: float
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class Norm:
    """kind "rms_norm" or "layer_norm"; the rest as those ops have it. `bias`: a layer norm's."""

    kind: str = "rms_norm"
    eps: float
    weight_cast: str = "before"
    offset: float = 0.0
    composed: bool = False
    bias: bool = False


LLAMA_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_in": "input_layernorm",
    "mlp_in": "post_attention_layernorm",
}
"""A block's modules by their role, in the order of transformers' `named_parameters()`.

q, k, v or qkv, then o; q_norm and k_norm; gate and up, gate_up, or up alone (no gate); down; and the norms: attn_in and
mlp_in before the two parts of a block, attn_out and mlp_out behind them. A role that a family lacks is not computed.
"""

LINEAR_ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
"""The roles of linear layers."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """Where a family's parameters stand: HF's names."""

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    modules: Mapping[str, str] = field(default_factory=lambda: LLAMA_MODULES)

    def module(self, layer: int, role: str) -> str:
        return f"{self.layers}.{layer}.{self.modules[role]}"


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model.

    data            config.json, complete: what is written when the model is saved
    defaults        the keys that the file read does not have, with the values taken for them
    biases          the roles whose linear layers have a bias
    parallel        "" or the order in which attention, MLP and residual are added: "residual_first", "mlp_first"
    qkv             how a fused projection is cut: "slices" (Phi-3), "split" (GPT-2), "heads" (GPT-NeoX)
    qk_norm         "flat" (over all heads), "head" (of each, [B, H, T, D]), "head_first" ([B, T, H, D]), "each" (one
                    layer norm a head)
    conv1d          linear weights are [in, out]
    rope_dtype      dtype of cos and sin where it is not the model's; rope_upcast, interleaved: the attributes of `rope`
    embedding_scale factor of the embeddings, rounded to the model's dtype first where `round_embedding_scale`
    residual_scale  factor of what each part of a block adds
    logit_scale, logit_divisor, logit_cap   as `shape_logits` has them
    attention_cap, softmax_dtype            as `attention` has them
    sdpa            whether transformers has its fused attention for this family
    padding_idx     the row of the embedding that gets no gradient
    restart_after   tokens after which a generation starts over: what is cached was turned by other frequencies
    stored          (parameter, its name in the checkpoint) where they differ: read and written
    accepted        (pattern, replacement) of names elsewhere, which are only read
    buffers         a pattern of tensors that are passed over, since the config gives them
    dropout         what config.json asks for in training: none of it enters the computation
    """

    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: str
    layers: tuple[Layer, ...]
    norm: Norm
    names: Names = Names()
    biases: frozenset[str] = frozenset()
    parallel: str = ""
    qkv: str = ""
    qk_norm: str = ""
    conv1d: bool = False
    rope_dtype: str = ""
    rope_upcast: str = ""
    interleaved: bool = False
    embedding_scale: float = 1.0
    round_embedding_scale: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_cap: float = 0.0
    attention_cap: float = 0.0
    softmax_dtype: str = "float32"
    sdpa: bool = True
    tie_word_embeddings: bool = False
    padding_idx: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    restart_after: int | None = None
    stored: tuple[tuple[str, str], ...] = ()
    accepted: tuple[tuple[str, str], ...] = ()
    buffers: str = r".*rotary_emb\.inv_freq"
    dropout: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    defaults: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert len(self.layers) == self.num_hidden_layers
        assert len({layer.window for layer in self.layers if layer.window is not None}) <= 1

    @property
    def window(self) -> int | None:
        """The window of the layers that have one."""
        return next((layer.window for layer in self.layers if layer.window is not None), None)

    @property
    def embedding(self) -> str:
        return f"{self.names.embedding}.weight"

    @property
    def head(self) -> str:
        """The parameter that is the output head: the embedding where they are tied."""
        return self.embedding if self.tie_word_embeddings else f"{self.names.head}.weight"

    def parameter(self, name: str) -> str:
        """The parameter that a checkpoint has as `name`, one of `accepted`."""
        for pattern, replacement in self.accepted:
            name = re.sub(f"^{pattern}", replacement, name)
        return name

    def linear_layers(self) -> tuple[str, ...]:
        """The last parts of the names of a block's linear layers, each once: what adapters are put beside."""
        modules = self.names.modules
        return tuple(dict.fromkeys(modules[role].rpartition(".")[2] for role in LINEAR_ROLES if role in modules))

    def linear_weights(self) -> tuple[str, ...]:
        """The names of all blocks' linear weights."""
        roles = [role for role in LINEAR_ROLES if role in self.names.modules]
        return tuple(
            f"{self.names.module(layer, role)}.weight" for layer in range(self.num_hidden_layers) for role in roles
        )

    def eight_bit_weights(self) -> tuple[str, ...]:
        """The weights that inference in 8 bits codes: the blocks' linear layers and the head, a tied embedding with it.

        GPT-2's layers lie transposed, and so would have a scale an input: they stay.
        """
        return (*(() if self.conv1d else self.linear_weights()), self.head)

    def tied(self) -> dict[str, str]:
        """Names that are another parameter under a second name: {name: parameter}."""
        return {f"{self.names.head}.weight": self.embedding} if self.tie_word_embeddings else {}

    def embedding_factor(self, dtype: str) -> float:
        """`embedding_scale` as it multiplies embeddings of `dtype`."""
        if not self.round_embedding_scale:
            return self.embedding_scale
        single = struct.pack("<f", self.embedding_scale)
        if dtype == "bfloat16":
            bits = int.from_bytes(single, "little")
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            single = bits.to_bytes(4, "little")
        return struct.unpack("<f", single)[0]

    def parameter_shapes(self) -> dict[str, Shape]:
        """Every parameter and its shape, in the order of transformers' `named_parameters()`; a tied head is not one."""
        names, hidden = self.names, self.hidden_size
        shapes: dict[str, Shape] = {self.embedding: (self.vocab_size, hidden)}
        if names.positions is not None:
            shapes[f"{names.positions}.weight"] = (self.max_position_embeddings, hidden)
        for layer in range(self.num_hidden_layers):
            for role in names.modules:
                shapes.update(self._module(names.module(layer, role), role))
        shapes.update(self._norm(names.norm, hidden))
        if not self.tie_word_embeddings:
            shapes[f"{names.head}.weight"] = (self.vocab_size, hidden)
        return shapes

    def _norm(self, name: str, width: int) -> dict[str, Shape]:
        made: dict[str, Shape] = {f"{name}.weight": (width,)}
        if self.norm.bias:
            made[f"{name}.bias"] = (width,)
        return made

    def _module(self, name: str, role: str) -> dict[str, Shape]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        if role in ("q_norm", "k_norm"):
            heads = self.num_attention_heads if role == "q_norm" else self.num_key_value_heads
            if self.qk_norm == "each":
                return {f"{name}.norms.{head}.weight": (self.head_dim,) for head in range(heads)}
            return {f"{name}.weight": (heads * self.head_dim if self.qk_norm == "flat" else self.head_dim,)}
        widths = {
            "q": (q, hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
            "qkv": (q + 2 * kv, hidden),
            "o": (hidden, q),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }
        if role not in widths:
            return self._norm(name, hidden)
        out_width, in_width = widths[role]
        made: dict[str, Shape] = {f"{name}.weight": (in_width, out_width) if self.conv1d else (out_width, in_width)}
        if role in self.biases:
            made[f"{name}.bias"] = (out_width,)
        return made
