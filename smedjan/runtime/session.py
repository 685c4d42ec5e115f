"""A model's live arrays on one backend, and the programs that run over them, cached by what they are bound to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from smedjan.backends.base import Array, Backend
from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.raw import RawTensor
from smedjan.errors import ConfigError, ShapeError
from smedjan.graph.grad import grad
from smedjan.graph.no_gc import no_gc
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.rewrite import cse, decompose, distinct_outputs, prune
from smedjan.graph.tensor import Spec
from smedjan.models.decoder import Decoder, Form
from smedjan.models.decoder_config import DecoderConfig
from smedjan.ops.loss import GRADIENTS_IN_FORWARD
from smedjan.ops.optimizer import accumulate as accumulate_op
from smedjan.ops.quantized import STORED, Affine, affine_linear, int8_specs
from smedjan.passes.affine import affine, read_codes
from smedjan.passes.fp8 import fp8
from smedjan.passes.int8 import int8
from smedjan.passes.lora import DTYPE as ADAPTER_DTYPE
from smedjan.passes.lora import Lora, adapt
from smedjan.passes.quantize import fuse, quantize
from smedjan.passes.w8a8 import w8a8
from smedjan.runtime.adapters import factors

if TYPE_CHECKING:
    from smedjan.data.collate import Batch

ROW_BUCKET = 16
"""Trained rows are rounded up to a multiple of this, so that few programs are built."""


@dataclass
class Session:
    """`parameters` holds base weights by HF name and adapters by PEFT name: programs read, the update writes them.

    memory, reserved  bytes of the device (None: all there is), and those of them that programs leave alone
    `quantized` names the weights that are held in fewer bits, each as the arrays of `STORED[storage]`; `int8` those
    that are held as `int8_specs`, for inference alone; `affine` those that the model's files hold in MLX's format.
    fp8     training takes the products of the blocks' linear layers of 8-bit floats. What measures or uses the model
            does not: its weights stay as they are stored, and others compute with them in their dtype
    w8a8    names of frozen weights whose products in training's forward pass are of 8-bit integers; their codes lie
            beside them, as `int8_specs`. What measures or uses the model computes with the weights
    z_loss, label_smoothing, neftune   of training's loss and embeddings (`linear_cross_entropy`, `noised`); a loss that
            is not differentiated is the plain one
    """

    backend: Backend
    config: DecoderConfig
    parameters: dict[str, Array]
    dtype: str
    attention: str = "sdpa"
    lora: Lora | None = None
    memory: int | None = None
    reserved: int = 0
    quantized: tuple[str, ...] = ()
    storage: str = "nf4"
    fp8: bool = False
    int8: tuple[str, ...] = ()
    affine: Mapping[str, Affine] = field(default_factory=dict)
    w8a8: tuple[str, ...] = ()
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    neftune: float = 0.0

    def __post_init__(self) -> None:
        self.programs: dict[Any, Program] = {}
        self.norms: dict[Any, Program] = {}
        self.switched = 0
        self._pools: dict[str, Any] = {}
        self.quantization_error = 0.0  # |w - codes| / |w| over the weights in `int8`, where they were made
        self.flops = 0
        """Of all micro-batches and updates so far, as the costs of their programs count them."""

    def use(self, lora: Lora | None, arrays: Mapping[str, Array]) -> None:
        """Lays these adapters beside the base in the place of the present ones. The base stays as it is, and programs
        are kept: adapters of the same settings share them."""
        for name in [name for name in self.parameters if ".lora_" in name]:
            del self.parameters[name]
        self.parameters.update(arrays)
        self.lora = lora
        self.switched += 1

    def host(self, array: Any, dtype: str) -> Array:
        """A host array, as a program of the backend reads it."""
        return self.backend.batch(RawTensor.of(np.asarray(array, dtype=dtype, order="C")))

    def specs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every parameter, adapters among them, without a look at the device."""
        base = self.config.parameter_shapes()
        adapters = {} if self.lora is None else self.lora.shapes(base)
        stored = {
            f"{name}.{suffix}": (spec.shape, spec.dtype)
            for names, storage in ((self.quantized, self.storage), (self.int8, "int8"))
            for name in names
            for suffix, spec in STORED[storage](base.pop(name)).items()
        }
        stored |= {
            f"{name}.{suffix}": (spec.shape, spec.dtype)
            for name, held in self.affine.items()
            for suffix, spec in held.specs(base.pop(name), self.dtype).items()
        }
        coded = {
            f"{name}.{suffix}": (spec.shape, spec.dtype)
            for name in self.w8a8
            for suffix, spec in int8_specs(base[name]).items()
        }
        return (
            {name: (shape, self.dtype) for name, shape in base.items()}
            | stored
            | coded
            | {name: (shape, ADAPTER_DTYPE) for name, shape in adapters.items()}
        )

    def form(self, batch: Batch, **changes: Any) -> Form:
        rows, seq = batch.input_ids.shape
        return replace(
            Form(
                batch=rows,
                seq=seq,
                positions=len(common_positions(batch.position_ids)),
                dtype=self.dtype,
                kind=batch.kind,
                attention=self.attention,
                windowed=batch.kind == "causal" and fills_window(self.config, seq),
            ),
            **changes,
        )

    def forward(self, decoder: Decoder, *, train: bool = False) -> Graph:
        """The declared graph with adapters, decomposed already where the backend is exact. Dropout is for training."""
        graph = self.narrow(decoder.graph)
        if self.int8:
            assert not train, "8-bit weights are for inference"
            graph = int8(graph, self.int8)
        if self.lora is not None:
            lora = self.lora if train else replace(self.lora, dropout=0.0)
            graph = adapt(graph, lora, exact=self.backend.exact, factors=decoder.form.capacity > 0)
        if self.fp8 and train:
            graph = fp8(graph, keep=(self.config.head,))
        has = self.backend.rules.has
        coded = self.w8a8 if train else ()
        if self.backend.exact:
            return decompose(w8a8(graph, coded), has)
        if self.quantized and not train:
            graph = fuse(graph)
        if self.affine and affine_linear.name in self.backend.rules.ops():
            graph = read_codes(graph)
        graph = w8a8(self.backend.fuse(graph), coded)
        # Its gradient is what it saved in the forward: what no rule saves is taken apart before it is differentiated.
        return decompose(graph, lambda node: node.op not in GRADIENTS_IN_FORWARD or has(node))

    def narrow(self, graph: Graph) -> Graph:
        """The graph over the weights as they are held in fewer bits, if they are."""
        graph = quantize(graph, self.quantized, self.storage) if self.quantized else graph
        return affine(graph, self.affine) if self.affine else graph

    def finish(self, graph: Graph, *, smallest: bool = False) -> Program:
        """`cse` is safe on both kinds: equal pure nodes have equal bits."""
        if not self.backend.exact:
            graph = decompose(graph, self.backend.rules.has)
        name = self.backend.name
        if name not in self._pools:
            self._pools[name] = self.backend.pool(self.memory, self.reserved)
        lower = self.backend.smallest if smallest else self.backend.program
        return lower(distinct_outputs(cse(prune(graph))), self._pools[name])

    def reserve(self, program: Program) -> None:
        """Takes the memory that the largest program needs at once: what grows while it is in use is there twice."""
        pool = self._pools.get(self.backend.name)
        if pool is not None and program.arena_bytes:
            pool.arena_of(program.arena_bytes)

    def logits_program(self, form: Form) -> Program:
        key = ("logits", form, self.lora)
        if key not in self.programs:
            with no_gc():
                decoder = Decoder(self.config, form)
                decoder.graph.output("logits", decoder.logits())
                self.programs[key] = self.finish(self.forward(decoder))
        return self.programs[key]

    def micro_program(self, form: Form, wrt: Sequence[str], *, accumulate: bool = False) -> Program:
        """loss and grad.NAME for each name; with `accumulate`, each is added to the input total of the same name."""
        key = ("micro", form, tuple(wrt), accumulate, self.lora)
        if key not in self.programs:
            with no_gc():
                self.programs[key] = self.finish(self.micro_graph(form, wrt, accumulate=accumulate))
        return self.programs[key]

    def micro_graph(self, form: Form, wrt: Sequence[str], *, accumulate: bool = False) -> Graph:
        """What `micro_program` lowers."""
        train = bool(wrt)
        decoder = Decoder(
            self.config,
            form,
            early=self.lora is None or self.lora.dropout == 0,
            neftune=self.neftune if train else 0.0,
        )
        names = {self.config.tied().get(name, name) for name in wrt}
        head = self.config.head
        grads = ("x" if names - {head} or head == self.config.embedding else "") + ("w" if head in names else "")
        terms = {"z_loss": self.z_loss, "smoothing": self.label_smoothing} if train else {}
        decoder.graph.output("loss", decoder.loss(grads, **terms))
        graph = self.forward(decoder, train=train)
        self._differentiate(graph, wrt, accumulate)
        return graph

    def _differentiate(self, graph: Graph, wrt: Sequence[str], accumulate: bool) -> None:
        unknown = [name for name in wrt if name not in graph.inputs]
        if unknown:
            raise ShapeError(f"{unknown[0]!r} is no parameter of this model", field="wrt")
        loss = graph.outputs["loss"]
        for name, gradient in zip(wrt, grad(loss, [graph.inputs[name] for name in wrt]), strict=True):
            assert gradient is not None, f"the loss does not depend on {name}"
            if accumulate:
                gradient = accumulate_op(graph.input(f"total.{name}", gradient.shape, gradient.dtype), gradient)
            graph.output(f"grad.{name}", gradient)

    def batch_inputs(self, batch: Batch) -> dict[str, Array]:
        made = {
            "input_ids": self.host(batch.input_ids, "int64"),
            "position_ids": self.host(common_positions(batch.position_ids), "int64"),
        }
        if batch.kind == "padded":
            made["attention_mask"] = self.host(batch.attention_mask, "bool")
        if batch.kind == "packed":
            made["segment_ids"] = self.host(batch.segment_ids, "int64")
        return made

    def micro(
        self,
        batch: Batch,
        wrt: Sequence[str],
        *,
        num_items: float,
        totals: Mapping[str, Array] | None = None,
        dropout_key: Sequence[int] = (0, 0, 0, 0),
        observe: Any = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Loss (a scalar on the device) and gradients by name, added to `totals` where given."""
        labels, rows = batch.labels.reshape(-1), 0
        inputs = {**self.parameters, **self.batch_inputs(batch)}
        if not self.backend.exact:
            chosen = bucket_rows(labels)
            rows, labels = len(chosen), labels[chosen]
            inputs["loss_rows"] = self.host(chosen, "int64")
        inputs["labels"] = self.host(labels, "int64")
        inputs["num_items"] = self.host(np.float32(num_items), "float32")
        inputs["dropout_key"] = self.host(dropout_key, "int64")
        inputs.update({f"total.{name}": array for name, array in (totals or {}).items()})
        program = self.micro_program(self.form(batch, rows=rows), wrt, accumulate=totals is not None)
        made = program(inputs, observe=observe) if observe else program(inputs)
        self.flops += program.cost.flops
        return made["loss"], {name: made[f"grad.{name}"] for name in wrt}

    def logits(self, batch: Batch, *, observe: Any = None) -> Array:
        """[B, T, V] in the session's dtype."""
        program = self.logits_program(self.form(batch))
        inputs = {**self.parameters, **self.batch_inputs(batch)}
        return (program(inputs, observe=observe) if observe else program(inputs))["logits"]

    def trained_logits(self, batch: Batch) -> np.ndarray:
        """The logits at each trained row, float32 [R, V] in the order of `batch.loss_rows`."""
        if self.backend.exact:  # the head on some rows alone has other bits than on all
            logits = self.logits(batch)
        else:
            chosen = bucket_rows(batch.labels.reshape(-1))
            inputs = {**self.parameters, **self.batch_inputs(batch), "loss_rows": self.host(chosen, "int64")}
            logits = self.logits_program(self.form(batch, rows=len(chosen)))(inputs)["logits"]
        raw = self.backend.to_raw(logits)
        values = to_float32(raw).reshape(-1, raw.shape[-1])
        return values[batch.loss_rows] if self.backend.exact else values[: len(batch.loss_rows)]

    def predictions(self, batch: Batch) -> np.ndarray:
        """The likeliest token at each trained row, int64 [R] in the order of `batch.loss_rows`."""
        return self.trained_logits(batch).argmax(-1)


def bucket_rows(labels: np.ndarray) -> np.ndarray:
    """Indices of the trained rows, rounded up to a bucket with rows that are not trained (their label stays -100)."""
    trained = np.flatnonzero(labels != -100)
    wanted = min(len(labels), max(ROW_BUCKET, -(-len(trained) // ROW_BUCKET) * ROW_BUCKET))
    spare = np.flatnonzero(labels == -100)[: wanted - len(trained)]
    return np.concatenate([trained, spare]).astype(np.int64)


def fills_window(config: DecoderConfig, keys: int) -> bool:
    """Whether so many keys are as many as the sliding window takes: from there on its layers need a mask."""
    return config.window is not None and keys >= config.window


def common_positions(position_ids: np.ndarray) -> np.ndarray:
    """[1, T] where every row counts alike, else the [B, T] given."""
    return position_ids[:1] if (position_ids == position_ids[:1]).all() else position_ids


class Cache:
    """Key/value caches of one generation: written in place, `length` tokens long. Adapters stay as they are in it."""

    def __init__(self, session: Session, *, batch: int, capacity: int) -> None:
        self.session, self.batch, self.capacity, self.length = session, batch, capacity, 0
        config = session.config
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.factors, self.switched = factors(session), session.switched
        self.arrays: dict[str, Array] = {
            f"cache.{layer}.{kind}": session.backend.zeros(shape, session.dtype)
            for layer in range(config.num_hidden_layers)
            for kind in "kv"
        }

    @property
    def held_bytes(self) -> int:
        """What each token reads: the weights as they are held, and the caches."""
        config = self.session.config
        size = self.batch * config.num_key_value_heads * self.capacity * config.head_dim
        caches = Spec((2 * config.num_hidden_layers, size), self.session.dtype)
        return caches.nbytes + sum(Spec(*each).nbytes for each in self.session.specs().values())

    def feed(
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, *, last: bool = False
    ) -> Array:
        """Logits [B, T, V] of the new tokens; `attention_mask` [B, length + T] covers old and new ones. They may come
        in blocks of any size.

        With `last`, a fast backend makes those of each row's last token alone, [B, V].
        """
        session, ids = self.session, np.asarray(input_ids, dtype=np.int64)
        if self.switched != session.switched:
            raise ConfigError(
                "another one is in use than when this text was begun", field="adapter", remedy="begin the text anew"
            )
        seq, end = ids.shape[1], self.length + ids.shape[1]
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        padded = attention_mask is not None and not np.all(attention_mask)
        if self.length and seq > 1 and not padded:
            # The causal kernels align queries with the first keys; a later block needs its triangle spelt out.
            attention_mask, padded = np.ones((self.batch, end), dtype=np.bool_), True
        if position_ids is None:
            position_ids = np.arange(self.length, end)[None]
        positions = common_positions(np.asarray(position_ids, dtype=np.int64))
        seen = self.length if session.config.window is None else min(self.length, session.config.window - 1)
        form = Form(
            batch=self.batch,
            seq=seq,
            positions=len(positions),
            dtype=session.dtype,
            kind="padded" if padded else "causal",
            attention=session.attention,
            capacity=self.capacity,
            windowed=not padded and fills_window(session.config, seen + seq),
            rows=self.batch if last and not session.backend.exact else 0,
        )
        inputs = {**session.parameters, **self.factors, **self.arrays}
        inputs["input_ids"] = session.host(ids, "int64")
        inputs["position_ids"] = session.host(positions, "int64")
        if padded:
            inputs["attention_mask"] = session.host(attention_mask, "bool")
        if form.rows:
            inputs["loss_rows"] = session.host(np.arange(1, self.batch + 1) * seq - 1, "int64")
        inputs["start"], inputs["end"] = self.length, end
        made = session.logits_program(form)(inputs)
        self.arrays = {name: made[name] for name in self.arrays}
        self.length = end
        return made["logits"]
