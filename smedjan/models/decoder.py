"""The graph of a decoder, declared once for every family and every backend.

B batch, T seq, S cache capacity, A heads, K key/value heads, D head_dim, H hidden_size, V vocab_size. Nodes are made in
the order in which transformers' modules compute: `grad` sums in that order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from smedjan.graph.node import Graph
from smedjan.graph.tensor import Tensor
from smedjan.models.decoder_config import DecoderConfig, Layer
from smedjan.ops.activation import activation
from smedjan.ops.attention import (
    attention,
    causal_mask,
    contiguous,
    document_mask,
    merge_heads,
    padding_mask,
    split_heads,
    swap_heads,
)
from smedjan.ops.cache import kv_read, kv_write
from smedjan.ops.elementwise import add, reshape, scale
from smedjan.ops.embedding import embedding, take_rows
from smedjan.ops.glu import glu
from smedjan.ops.linear import conv1d, linear
from smedjan.ops.loss import linear_cross_entropy, shape_logits
from smedjan.ops.norm import layer_norm, rms_norm
from smedjan.ops.random import noised
from smedjan.ops.rope import RopeConfig, rope, rope_tables
from smedjan.ops.shape import concat, slice_last, split

KINDS = ("causal", "padded", "packed")
Tables = dict[RopeConfig, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a program is bound to: dims, dtype and which of the mask paths the batch takes.

    rows      R, the rows that reach the head (fast backends); 0 takes every row, as transformers does
    capacity  S, length of the key/value caches; 0 runs without one
    positions rows of position_ids: 1 where all rows of the batch count alike (transformers' strides depend on it), or B
    windowed  a causal batch is no shorter than the sliding window, so that the layers that have one need a mask
    """

    batch: int
    seq: int
    positions: int = 1
    dtype: str = "float32"
    kind: str = "causal"
    attention: str = "sdpa"
    rows: int = 0
    capacity: int = 0
    windowed: bool = False

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind


@dataclass
class Decoder:
    """Builds one graph: parameters are inputs under their HF names, made in `named_parameters()` order.

    `early` chooses the form's rows behind the last attention, since what follows takes each row by itself; without it
    they are chosen before the last norm. Dropout needs that: its masks count the elements of all rows.

    `neftune` is the alpha of noise on the embeddings (`noised`), for training; 0: none.
    """

    config: DecoderConfig
    form: Form
    early: bool = True
    neftune: float = 0.0
    graph: Graph = field(default_factory=Graph)

    def __post_init__(self) -> None:
        self.parameters: dict[str, Tensor] = {
            name: self.graph.input(name, shape, self.form.dtype)
            for name, shape in self.config.parameter_shapes().items()
        }
        self._masks: dict[int, Tensor | None] = {}

    def hidden(self) -> Tensor:
        """Hidden states after the last norm, [B, T, H], or [R, H] of the form's rows. Declares the batch's inputs and,
        with a cache, its outputs."""
        form, graph, config = self.form, self.graph, self.config
        input_ids = graph.input("input_ids", (form.batch, form.seq), "int64")
        position_ids = graph.input("position_ids", (form.positions, form.seq), "int64")
        x = self._embedded(input_ids)
        if config.names.positions is not None:
            x = add(x, embedding(position_ids, self.parameters[f"{config.names.positions}.weight"]))
        self._declare_masks(input_ids)
        tables = self._tables(position_ids)
        window = None
        if form.capacity:
            window = (graph.input("start", (), "int64"), graph.input("end", (), "int64"))
        chosen = graph.input("loss_rows", (form.rows,), "int64") if form.rows else None
        for number in range(config.num_hidden_layers):
            last = number == config.num_hidden_layers - 1
            with graph.scope(f"layers.{number}"):
                x = self._block(x, number, tables, window, chosen if last and self.early else None)
        if chosen is not None and not self.early:
            x = self._chosen(x, chosen)
        with graph.scope("norm"):
            return self._norm(x, config.names.norm)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        """Noise comes behind the embedding module of transformers: Gemma's has its factor within, Granite's has not."""
        config = self.config
        x = embedding(input_ids, self.parameters[config.embedding], padding_idx=config.padding_idx)
        factor = config.embedding_factor(self.form.dtype)
        within = config.round_embedding_scale
        if factor != 1.0 and within:
            x = scale(x, factor=factor)
        if self.neftune:
            x = noised(x, self.graph.input("dropout_key", (4,), "int64"), alpha=self.neftune)
        if factor != 1.0 and not within:
            x = scale(x, factor=factor)
        return x

    def _tables(self, position_ids: Tensor) -> Tables:
        config = self.config
        ropes = dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None)
        return {
            each: rope_tables(
                position_ids,
                rope=each,
                head_dim=config.head_dim,
                dtype=config.rope_dtype or self.form.dtype,
                interleaved=config.interleaved,
            )
            for each in ropes
        }

    def _declare_masks(self, input_ids: Tensor) -> None:
        """One mask for each window among the layers (0: none), None where attention's own triangle is enough."""
        form, graph = self.form, self.graph
        keys = form.capacity or form.seq
        source: Tensor | None = None
        if form.kind == "packed":
            source = graph.input("segment_ids", (form.batch, form.seq), "int64")
        if form.kind == "padded":
            source = graph.input("attention_mask", (form.batch, keys), "bool")
        for window in dict.fromkeys(layer.window or 0 for layer in self.config.layers):
            if form.kind == "packed":
                assert source is not None
                mask: Tensor | None = document_mask(source, window=window)
            elif form.kind == "padded":
                assert source is not None
                mask = padding_mask(source, queries=form.seq, window=window)
            elif (window and form.windowed) or (self._implementation == "eager" and form.seq > 1):
                mask = causal_mask(input_ids, keys=keys, window=window)
            else:
                mask = None
            self._masks[window] = mask

    @property
    def _implementation(self) -> str:
        """Where transformers has no fused attention (it caps no scores), it computes the eager one unasked."""
        return self.form.attention if self.config.sdpa else "eager"

    def _norm(self, x: Tensor, name: str) -> Tensor:
        norm, weight = self.config.norm, self.parameters[f"{name}.weight"]
        if norm.kind == "rms_norm":
            return rms_norm(x, weight, eps=norm.eps, weight_cast=norm.weight_cast, offset=norm.offset)
        return layer_norm(x, weight, self.parameters.get(f"{name}.bias"), eps=norm.eps, composed=norm.composed)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")
        return conv1d(x, weight, bias) if self.config.conv1d else linear(x, weight, bias)

    def _role(self, x: Tensor, number: int, role: str) -> Tensor:
        """The norm or linear layer of that role, under its own scope where it stands outside attention and MLP; x as it
        is where the family has none."""
        modules = self.config.names.modules
        if role not in modules:
            return x
        name = self.config.names.module(number, role)
        if role.endswith(("_in", "_out")):
            with self.graph.scope(modules[role]):
                return self._norm(x, name)
        return self._linear(x, name)

    def _block(self, x: Tensor, number: int, tables: Tables, window, rows: Tensor | None) -> Tensor:
        config, graph = self.config, self.graph
        normed = self._role(x, number, "attn_in")
        with graph.scope(config.names.modules["o"].rpartition(".")[0]):
            heads = self._attention(normed, number, tables, window)
            if rows is not None:
                x, normed, heads = self._chosen(x, rows), self._chosen(normed, rows), self._chosen(heads, rows)
            attended = self._role(heads, number, "o")
        attended = self._scaled(self._role(attended, number, "attn_out"))
        if config.parallel:
            inner = self._mlp(self._role(x, number, "mlp_in") if "mlp_in" in config.names.modules else normed, number)
            if config.parallel == "mlp_first":
                return add(add(inner, attended), x)
            return add(add(x, attended), inner)
        x = add(x, attended)
        inner = self._mlp(self._role(x, number, "mlp_in"), number)
        return add(x, self._scaled(self._role(inner, number, "mlp_out")))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.config.residual_scale == 1.0 else scale(x, factor=self.config.residual_scale)

    def _mlp(self, x: Tensor, number: int) -> Tensor:
        config, modules = self.config, self.config.names.modules
        with self.graph.scope(modules["down"].rpartition(".")[0]):
            if "gate_up" in modules:
                both = self._role(x, number, "gate_up")
                gate, up = split(both, sizes=(config.intermediate_size,) * 2, dim=-1)
                inner = glu(gate, up, act=config.hidden_act)
            elif "gate" in modules:
                gate = self._role(x, number, "gate")
                inner = glu(gate, self._role(x, number, "up"), act=config.hidden_act)
            else:
                inner = activation(self._role(x, number, "up"), config.hidden_act)
            return self._role(inner, number, "down")

    def _attention(self, x: Tensor, number: int, tables: Tables, window) -> Tensor:
        config, form, layer = self.config, self.form, self.config.layers[number]
        q, k, v = self._heads(x, number)
        if layer.rope is not None:
            cos, sin = tables[layer.rope]
            attrs = {"interleaved": config.interleaved, "upcast": config.rope_upcast}
            q, k = rope(q, cos, sin, **attrs), rope(k, cos, sin, **attrs)
        if window is not None:
            k, v = self._cached(f"{number}.k", k, layer, window), self._cached(f"{number}.v", v, layer, window)
        if self._implementation == "eager" and form.kind != "packed" and q.shape[1] == k.shape[1]:
            # transformers' cache, which it fills in training too (but for packed rows), has copied both.
            k, v = contiguous(k), contiguous(v)
        mask = self._masks[layer.window or 0]
        y = attention(
            q,
            k,
            v,
            mask,
            causal=mask is None and form.seq > 1,
            scale=layer.scale,
            implementation=self._implementation,
            cap=config.attention_cap,
            softmax_dtype=config.softmax_dtype,
        )
        return merge_heads(y)

    def _heads(self, x: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, A, T, D], k and v [B, K, T, D]"""
        config = self.config
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if config.qkv == "heads":
            each = split_heads(self._role(x, number, "qkv"), heads=heads)
            q, k, v = split(each, sizes=(dim,) * 3, dim=-1)
            return q, k, v
        if config.qkv:
            q, k, v = self._fused(self._role(x, number, "qkv"))
            return split_heads(q, heads=heads), split_heads(k, heads=kv_heads), split_heads(v, heads=kv_heads)
        if config.qk_norm == "head_first":
            q = self._normed_first(self._role(x, number, "q"), number, "q_norm", heads)
            k = self._normed_first(self._role(x, number, "k"), number, "k_norm", kv_heads)
            return q, k, split_heads(self._role(x, number, "v"), heads=kv_heads)
        if config.qk_norm == "flat":
            q = self._norm(self._role(x, number, "q"), config.names.module(number, "q_norm"))
            k = self._norm(self._role(x, number, "k"), config.names.module(number, "k_norm"))
            v = self._role(x, number, "v")
            return split_heads(q, heads=heads), split_heads(k, heads=kv_heads), split_heads(v, heads=kv_heads)
        q = split_heads(self._role(x, number, "q"), heads=heads)
        k = split_heads(self._role(x, number, "k"), heads=kv_heads)
        v = split_heads(self._role(x, number, "v"), heads=kv_heads)
        if config.qk_norm:
            q, k = self._normed(q, number, "q_norm"), self._normed(k, number, "k_norm")
        return q, k, v

    def _fused(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        kv = config.num_key_value_heads * config.head_dim
        q = config.num_attention_heads * config.head_dim
        if config.qkv == "split":
            one, two, three = split(qkv, sizes=(q, kv, kv), dim=-1)
            return one, two, three
        ends = (0, q, q + kv, q + 2 * kv)
        one, two, three = (slice_last(qkv, start=a, stop=b) for a, b in pairwise(ends))
        return one, two, three

    def _normed_first(self, x: Tensor, number: int, role: str, heads: int) -> Tensor:
        """[B, T, heads * D] -> [B, heads, T, D], normed before the move: the order of a sum over rows hangs on it."""
        each = reshape(x, shape=(*x.shape[:-1], heads, self.config.head_dim))
        return swap_heads(self._norm(each, self.config.names.module(number, role)))

    def _normed(self, x: Tensor, number: int, role: str) -> Tensor:
        """[B, heads, T, D], each head by the one norm, or by its own."""
        name = self.config.names.module(number, role)
        if self.config.qk_norm == "head":
            return self._norm(x, name)
        parts = split(x, sizes=(1,) * x.shape[1], dim=1)
        return concat(*(self._norm(part, f"{name}.norms.{head}") for head, part in enumerate(parts)), dim=1)

    def _chosen(self, x: Tensor, rows: Tensor) -> Tensor:
        """[B, T, D] -> [R, D]"""
        return take_rows(reshape(x, shape=(self.form.batch * self.form.seq, x.shape[-1])), rows)

    def _cached(self, name: str, fresh: Tensor, layer: Layer, window: tuple[Tensor, Tensor]) -> Tensor:
        start, end = window
        shape = (fresh.shape[0], fresh.shape[1], self.form.capacity, fresh.shape[3])
        cache = kv_write(self.graph.input(f"cache.{name}", shape, fresh.dtype), fresh, start)
        self.graph.output(f"cache.{name}", cache)
        return kv_read(cache, end, seq=self.form.seq, window=layer.window or 0)

    def _shaping(self) -> dict[str, float]:
        config = self.config
        return {"scaling": config.logit_scale, "divisor": config.logit_divisor, "cap": config.logit_cap}

    def logits(self) -> Tensor:
        """[B, T, V] in the form's dtype; [R, V] of the rows chosen, where the form has `rows`."""
        hidden = self.hidden()
        with self.graph.scope("lm_head"):
            return shape_logits(linear(hidden, self.parameters[self.config.head]), **self._shaping())

    def loss(self, grads: str, **terms: float) -> Tensor:
        """Mean cross-entropy over the step's trained tokens, float32. `grads` and `terms` (z_loss, smoothing) as in
        `linear_cross_entropy`."""
        form, graph = self.form, self.graph
        hidden = self.hidden()
        rows = form.rows or form.batch * form.seq
        labels = graph.input("labels", (rows,), "int64")
        num_items = graph.input("num_items", (), "float32")
        head = self.parameters[self.config.head]
        with graph.scope("lm_head"):
            return linear_cross_entropy(hidden, head, labels, num_items, grads=grads, **self._shaping(), **terms)
