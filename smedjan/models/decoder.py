"""The graph of a pre-norm decoder (Llama and its kin), declared once for every backend.

B batch, T seq, S cache capacity, A heads, K key/value heads, D head_dim, H hidden_size, V vocab_size. Nodes are made in
the order in which transformers' modules compute: `grad` sums in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from smedjan.graph.node import Graph
from smedjan.graph.tensor import Tensor
from smedjan.models import llama
from smedjan.models.llama import LlamaConfig
from smedjan.ops.attention import attention, causal_mask, document_mask, merge_heads, padding_mask, split_heads
from smedjan.ops.cache import kv_read, kv_write
from smedjan.ops.elementwise import add, reshape
from smedjan.ops.embedding import embedding, take_rows
from smedjan.ops.glu import glu
from smedjan.ops.linear import linear
from smedjan.ops.loss import linear_cross_entropy
from smedjan.ops.norm import rms_norm
from smedjan.ops.rope import rope, rope_tables

KINDS = ("causal", "padded", "packed")


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a program is bound to: dims, dtype and which of the mask paths the batch takes.

    rows      R, the rows that reach the head (fast backends); 0 takes every row, as transformers does
    capacity  S, length of the key/value caches; 0 runs without one
    positions rows of position_ids: 1 where all rows of the batch count alike (transformers' strides depend on it), or B
    """

    batch: int
    seq: int
    positions: int = 1
    dtype: str = "float32"
    kind: str = "causal"
    attention: str = "sdpa"
    rows: int = 0
    capacity: int = 0

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind


@dataclass
class Decoder:
    """Builds one graph: parameters are inputs under their HF names, made in `named_parameters()` order.

    `early` chooses the form's rows behind the last attention, since what follows takes each row by itself; without it
    they are chosen before the last norm. Dropout needs that: its masks count the elements of all rows.
    """

    config: LlamaConfig
    form: Form
    early: bool = True
    graph: Graph = field(default_factory=Graph)

    def __post_init__(self) -> None:
        shapes = llama.parameter_shapes(self.config)
        self.parameters: dict[str, Tensor] = {
            name: self.graph.input(name, shape, self.form.dtype) for name, shape in shapes.items()
        }

    @property
    def head(self) -> Tensor:
        tied: Mapping[str, str] = llama.tied(self.config)
        return self.parameters[tied.get(llama.HEAD, llama.HEAD)]

    def hidden(self) -> Tensor:
        """Hidden states after the last norm, [B, T, H], or [R, H] of the form's rows. Declares the batch's inputs and,
        with a cache, its outputs."""
        form, graph = self.form, self.graph
        input_ids = graph.input("input_ids", (form.batch, form.seq), "int64")
        position_ids = graph.input("position_ids", (form.positions, form.seq), "int64")
        mask = self._mask(input_ids)
        x = embedding(input_ids, self.parameters[llama.EMBEDDING], padding_idx=self.config.pad_token_id)
        rotation = self.config.rope
        cos, sin = rope_tables(
            position_ids,
            head_dim=self.config.head_dim,
            theta=float(rotation.rope_theta),
            dtype=form.dtype,
            rope_type=rotation.rope_type,
            factor=float(rotation.factor or 1.0),
            low_freq_factor=float(rotation.low_freq_factor or 1.0),
            high_freq_factor=float(rotation.high_freq_factor or 1.0),
            original_max_position_embeddings=int(rotation.original_max_position_embeddings or 0),
        )
        window = None
        if form.capacity:
            window = (graph.input("start", (), "int64"), graph.input("end", (), "int64"))
        chosen = graph.input("loss_rows", (form.rows,), "int64") if form.rows else None
        for layer in range(self.config.num_hidden_layers):
            last = layer == self.config.num_hidden_layers - 1
            with graph.scope(f"layers.{layer}"):
                x = self._block(x, layer, cos, sin, mask, window, chosen if last and self.early else None)
        if chosen is not None and not self.early:
            x = self._chosen(x, chosen)
        with graph.scope("norm"):
            return rms_norm(x, self.parameters["model.norm.weight"], eps=self.config.rms_norm_eps)

    def _mask(self, input_ids: Tensor) -> Tensor | None:
        form, graph = self.form, self.graph
        keys = form.capacity or form.seq
        if form.kind == "packed":
            return document_mask(graph.input("segment_ids", (form.batch, form.seq), "int64"))
        if form.kind == "padded":
            return padding_mask(graph.input("attention_mask", (form.batch, keys), "bool"), queries=form.seq)
        return causal_mask(input_ids, keys=keys) if form.attention == "eager" and form.seq > 1 else None

    def _block(
        self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, mask: Tensor | None, window, rows: Tensor | None
    ) -> Tensor:
        prefix, eps, graph = f"model.layers.{layer}", self.config.rms_norm_eps, self.graph
        with graph.scope("input_layernorm"):
            normed = rms_norm(x, self.parameters[f"{prefix}.input_layernorm.weight"], eps=eps)
        with graph.scope("self_attn"):
            heads = self._attention(normed, f"{prefix}.self_attn", cos, sin, mask, window)
            if rows is not None:
                x, heads = self._chosen(x, rows), self._chosen(heads, rows)
            attended = self._linear(heads, f"{prefix}.self_attn.o_proj")
        x = add(x, attended)
        with graph.scope("post_attention_layernorm"):
            normed = rms_norm(x, self.parameters[f"{prefix}.post_attention_layernorm.weight"], eps=eps)
        with graph.scope("mlp"):
            gate = self._linear(normed, f"{prefix}.mlp.gate_proj")
            up = self._linear(normed, f"{prefix}.mlp.up_proj")
            inner = glu(gate, up, act=self.config.hidden_act)
            down = self._linear(inner, f"{prefix}.mlp.down_proj")
        return add(x, down)

    def _attention(self, x: Tensor, prefix: str, cos: Tensor, sin: Tensor, mask: Tensor | None, window) -> Tensor:
        config, form = self.config, self.form
        q = split_heads(self._linear(x, f"{prefix}.q_proj"), heads=config.num_attention_heads)
        k = split_heads(self._linear(x, f"{prefix}.k_proj"), heads=config.num_key_value_heads)
        v = split_heads(self._linear(x, f"{prefix}.v_proj"), heads=config.num_key_value_heads)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if window is not None:
            start, end = window
            k, v = self._cached(f"{prefix}.k", k, start, end), self._cached(f"{prefix}.v", v, start, end)
        y = attention(
            q,
            k,
            v,
            mask,
            causal=mask is None and form.seq > 1,
            scale=config.head_dim**-0.5,
            implementation=form.attention,
        )
        return merge_heads(y)

    def _chosen(self, x: Tensor, rows: Tensor) -> Tensor:
        """[B, T, D] -> [R, D]"""
        return take_rows(reshape(x, shape=(self.form.batch * self.form.seq, x.shape[-1])), rows)

    def _cached(self, name: str, fresh: Tensor, start: Tensor, end: Tensor) -> Tensor:
        shape = (fresh.shape[0], fresh.shape[1], self.form.capacity, fresh.shape[3])
        cache = kv_write(self.graph.input(f"cache.{name}", shape, fresh.dtype), fresh, start)
        self.graph.output(f"cache.{name}", cache)
        return kv_read(cache, end)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def logits(self) -> Tensor:
        """[B, T, V] in the form's dtype; [R, V] of the rows chosen, where the form has `rows`."""
        hidden = self.hidden()
        with self.graph.scope("lm_head"):
            return linear(hidden, self.head)

    def loss(self, grads: str) -> Tensor:
        """Mean cross-entropy over the step's trained tokens, float32. `grads` as in `linear_cross_entropy`."""
        form, graph = self.form, self.graph
        hidden = self.hidden()
        rows = form.rows or form.batch * form.seq
        labels = graph.input("labels", (rows,), "int64")
        num_items = graph.input("num_items", (), "float32")
        with graph.scope("lm_head"):
            return linear_cross_entropy(hidden, self.head, labels, num_items, grads=grads)
