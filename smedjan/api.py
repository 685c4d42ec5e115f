"""The Python API: what `import smedjan` gives, imported from here on first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.raw import RawTensor, specs_of
from smedjan.checkpoint.run_dir import sha256_of
from smedjan.data.collate import IGNORE, Batch
from smedjan.data.mask import Example
from smedjan.errors import ConfigError, DataError
from smedjan.evaluate.fidelity import Comparison, MergeReport, compare, examples, logits_of
from smedjan.evaluate.run import EvalReport, evaluate
from smedjan.generate.loop import generate
from smedjan.generate.sampling import Sampling
from smedjan.hf.export import save_model
from smedjan.hf.import_model import ImportReport, import_model
from smedjan.hf.load import COMPUTED, MERGE_FIRST, ModelFiles, open_adapter, open_model, open_session, resolve
from smedjan.hf.new_tokens import files_of
from smedjan.hf.parity import ParityReport, parity
from smedjan.hf.peft import merged_weights, read_adapter
from smedjan.hf.tokenizer import Tokenizer, load_tokenizer
from smedjan.hf.trained import Trained, trained
from smedjan.hf.whole_modules import saved_names
from smedjan.passes.lora import Lora
from smedjan.runtime.select import backend as select_backend
from smedjan.runtime.session import Session
from smedjan.train.config import FinetuneConfig
from smedjan.train.finetune import Run, finetune
from smedjan.train.plan import Plan, plan

__all__ = [
    "EvalReport",
    "FinetuneConfig",
    "ImportReport",
    "MergeReport",
    "Model",
    "ParityReport",
    "Plan",
    "Run",
    "evaluate",
    "finetune",
    "import_model",
    "load",
    "merge",
    "parity",
    "plan",
]


@dataclass
class Model:
    """A model on a backend. Arrays go in as nested lists, numpy, torch or mlx arrays and come out as numpy ones."""

    files: ModelFiles
    session: Session
    adapters: dict[str, tuple[Lora, dict[str, Any]]] = field(default_factory=dict)
    adapter: str | None = None
    """The name of the one in use."""
    alone: bool = False
    """Whether the base is under embeddings or a head that its only adapter holds whole."""

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Loads one more adapter beside the same base; `use` lays it there."""
        if name in self.adapters:
            raise ConfigError(f"{name!r} is there already", field="adapter", remedy="give another name")
        if self.session.int8:
            raise ConfigError("goes with no adapter", field="quantize", remedy=MERGE_FIRST)
        if self.alone or saved_names(Path(path))[0]:
            raise ConfigError(
                "an adapter that holds embeddings or a head whole has no base in common with others",
                field="adapter",
                remedy="load it by itself",
            )
        self.adapters[name] = open_adapter(self.files, self.session.backend, Path(path))

    def use(self, name: str | None) -> None:
        """Computes with that adapter from now on, or (None) with the base alone. Nothing is loaded or copied."""
        if name is None and self.alone:
            raise ConfigError(
                "the base is under what its adapter holds whole", field="adapter", remedy="load the base by itself"
            )
        if name is None:
            self.session.use(None, {})
        elif name in self.adapters:
            self.session.use(*self.adapters[name])
        else:
            known = ", ".join(self.adapters) or "none"
            raise ConfigError(f"{name!r} is not loaded", field="adapter", remedy=f"loaded: {known}; see add_adapter")
        self.adapter = name

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`, as read."""
        return self.files.data

    @property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.files.tokenizer_path)

    def logits(self, input_ids: Any, attention_mask: Any = None) -> np.ndarray:
        """float32 [batch, seq, vocab]; bfloat16 results are widened, no bit lost."""
        batch = _batch(input_ids, attention_mask, None, self.session.config.vocab_size)
        return _numpy(self.session.backend.to_raw(self.session.logits(batch)))

    def loss_and_grads(
        self, batch: Mapping[str, Any], wrt: Sequence[str] | None = None
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Mean loss over the trained tokens, and the float32 gradient of each parameter named (all by default).

        batch: input_ids, labels (-100 = not trained; not shifted) and, optionally, attention_mask, [batch, seq].
        """
        if self.session.int8:
            raise ConfigError("8-bit weights have no gradients", field="quantize", remedy="load it without quantize")
        made = _batch(batch["input_ids"], batch.get("attention_mask"), batch["labels"], self.session.config.vocab_size)
        if made.trained_tokens == 0:
            raise DataError("no token is trained", field="labels", remedy="give a label other than -100")
        frozen = {f"{name}.{suffix}" for name in self.session.affine for suffix in ("affine", "scales", "biases")}
        names = [name for name in self.session.parameters if name not in frozen] if wrt is None else list(wrt)
        for name in names:
            if name in frozen or name in self.session.affine:
                raise ConfigError(f"{name!r} is in few bits and has no gradient", field="wrt", remedy="leave it out")
        loss, grads = self.session.micro(made, names, num_items=made.trained_tokens)
        to_raw = self.session.backend.to_raw
        return float(_numpy(to_raw(loss))), {name: _numpy(to_raw(grads[name])) for name in names}

    def generate(
        self,
        input_ids: Any,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """New tokens of one sequence, as they are made. `stop` defaults to the model's end-of-sequence tokens."""
        ids = np.asarray(input_ids).reshape(-1)
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        ends = self.session.config.eos_token_id if stop is None else stop
        return generate(
            self.session, ids.tolist(), max_new_tokens=max_new_tokens, stop=frozenset(ends), sampling=sampling
        )

    def save(self, path: str | Path) -> None:
        """A new model directory in Hugging Face's layout. An adapter is merged in first with `smedjan.merge`."""
        if self.session.int8:
            raise ConfigError("the model is in 8 bits", field="path", remedy="load it without quantize")
        if self.session.affine:
            raise ConfigError("the model is in few bits", field="path", remedy="write it with smedjan export --to mlx")
        if self.session.lora is not None:
            raise ConfigError("the model has an adapter", field="path", remedy="write it with smedjan.merge")
        weights = {name: self.session.backend.to_raw(array) for name, array in self.session.parameters.items()}
        save_model(Path(path), self.files.data, weights, self.files.path)


def load(
    path: str | Path,
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    attention: str = "sdpa",
    quantize: str | None = None,
) -> Model:
    """A model directory, run directory or hub id, on a backend. A run of LoRA is loaded with its base.

    `adapter`: a directory, or several by name, of which the first is in use (`Model.use` switches).

    quantize: "int8" holds the linear layers and the head as 8-bit codes with a scale a row, for decoding: the products
    are taken in float32 with `dtype` activations, the weights are off by at most half a scale each.
    """
    if quantize not in (None, "int8"):
        raise ConfigError(f"is {quantize!r}", field="quantize", remedy="give int8 or nothing")
    chosen = select_backend(backend)
    if device is not None and device != chosen.device:
        raise ConfigError(
            f"{chosen.name} runs on {chosen.device} here", field="device", remedy=f"give {chosen.device} or nothing"
        )
    if attention not in ("sdpa", "eager"):
        raise ConfigError(f"is {attention!r}", field="attention", remedy="give sdpa or eager")
    several = dict(adapter) if isinstance(adapter, Mapping) else {}
    base, laid = resolve(path, None if isinstance(adapter, Mapping) else adapter)
    if quantize is not None and (several or laid is not None):
        raise ConfigError("goes with no adapter", field="quantize", remedy=MERGE_FIRST)
    files = open_model(base, laid)
    session = open_session(files, chosen, dtype=dtype, attention=attention, int8=quantize is not None)
    model = Model(files, session)
    if laid is not None:
        model.adapters["default"] = open_adapter(files, chosen, laid)
        model.alone = bool(saved_names(laid)[0])
    for name, directory in several.items():
        model.add_adapter(name, directory)
    if model.adapters:
        model.use(next(iter(model.adapters)))
    return model


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    onto: str = "stored",
    storage: str | None = None,
    check: bool = True,
    data: str | Path | None = None,
    backend: str = "auto",
) -> MergeReport:
    """A new model directory with the adapter's product added to the weights, in float32, rounded once.

    Embeddings and heads that the adapter holds whole replace the base's, and so does its tokenizer with new tokens.

    onto     "stored": the model as it is stored; "trained": what 4 or 8 bits leave of it, where the adapter was trained
             on that (`qlora`): larger errors of the base, but those that the adapter has learnt to live with
    storage  "nf4" or "int8": what it was trained on, for an adapter that does not say
    check    runs the adapter beside its base, and the model that was written, on the same rows (of `data`, or a few
             prompts), and reports how far they are apart
    """
    if onto not in ("stored", "trained"):
        raise ConfigError(f"is {onto!r}", field="onto", remedy="give stored or trained")
    where = Path(adapter)
    files = open_model(base, where)
    lora, tensors = read_adapter(where, files.tensors)
    quantized = trained(files, where, storage)
    if onto == "trained" and quantized is None:
        raise ConfigError(
            "the adapter does not say that it was trained on other weights than the stored ones",
            field="onto",
            remedy="leave it out, or give --storage nf4 or int8",
        )
    # Rows that cannot be read are an error before anything is written.
    has_words = (files.tokenizer_path / "tokenizer.json").is_file()
    rows = examples(files, None if data is None else Path(data)) if check and (has_words or data is not None) else []
    chosen = dtype or files.dtype
    if onto == "trained" and quantized is not None:
        weights, merged, largest = merged_weights(quantized.widened(), quantized.lora, quantized.tensors, chosen)
    else:
        weights, merged, largest = merged_weights(files.tensors, lora, tensors, chosen)
    made = {} if files.own_tokenizer is None else files_of(files.own_tokenizer)
    save_model(Path(out), files.data, weights, files.path, extra_files=made)
    sha256 = sha256_of(weights)
    del weights
    return MergeReport(
        out=str(out),
        dtype=chosen,
        merged=merged,
        largest_change=largest,
        weights_sha256=sha256,
        comparisons=_beside_merged(files, where, quantized, Path(out), rows, backend) if rows else (),
    )


def _beside_merged(
    files: ModelFiles, adapter: Path, quantized: Trained | None, out: Path, rows: list[Example], backend: str
) -> tuple[Comparison, ...]:
    """One model at a time is in memory, and the logits of all."""
    chosen, found = select_backend(backend), {}
    if quantized is not None:
        found[f"adapter beside {quantized.storage}"] = logits_of(quantized.session(chosen), rows)
    dtype = files.dtype if files.dtype in COMPUTED else "float32"
    found["adapter beside base"] = logits_of(open_session(files, chosen, dtype=dtype, adapter=adapter), rows)
    made = open_model(out)
    dtype = made.dtype if made.dtype in COMPUTED else "float32"
    after = logits_of(open_session(made, chosen, dtype=dtype), rows)
    return tuple(compare(name, "merged", before, after, rows) for name, before in found.items())


def parameters_of(files: ModelFiles) -> int:
    """Elements of all parameters; a tied head once."""
    return sum(spec.numel for spec in specs_of(files.tensors).values())


def _numpy(raw: RawTensor) -> np.ndarray:
    return to_float32(raw).reshape(raw.shape).copy()


def _batch(input_ids: Any, attention_mask: Any, labels: Any, vocab_size: int) -> Batch:
    ids = _integers(input_ids, "input_ids")
    if ids.ndim != 2 or ids.size == 0:
        raise DataError(f"has shape {list(ids.shape)}", field="input_ids", remedy="give [batch, seq]")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise DataError(
            f"holds {int(ids.min() if ids.min() < 0 else ids.max())}",
            field="input_ids",
            remedy=f"ids lie between 0 and {vocab_size - 1}",
        )
    mask = None if attention_mask is None else _integers(attention_mask, "attention_mask")
    targets = np.full(ids.shape, IGNORE, dtype=np.int64)
    if labels is not None:
        given = _integers(labels, "labels")
        if given.shape != ids.shape:
            raise DataError(f"has shape {list(given.shape)}", field="labels", remedy=f"give {list(ids.shape)}")
        targets[:, :-1] = given[:, 1:]
    if mask is not None and mask.shape != ids.shape:
        raise DataError(f"has shape {list(mask.shape)}", field="attention_mask", remedy=f"give {list(ids.shape)}")
    padded = mask is not None and not mask.all()
    rows = np.flatnonzero(targets != IGNORE)
    return Batch(
        input_ids=ids,
        position_ids=np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape),
        labels=targets,
        attention_mask=mask if padded else None,
        segment_ids=None,
        loss_rows=rows,
        trained_tokens=len(rows),
        tokens=ids.size if mask is None else int(mask.sum()),
        kind="padded" if padded else "causal",
    )


def _integers(value: Any, field: str) -> np.ndarray:
    array = np.asarray(value.tolist() if hasattr(value, "tolist") else value)
    if array.size and array.dtype.kind not in "iub":
        raise DataError(f"holds {array.dtype}", field=field, remedy="give integers")
    return array.astype(np.int64)
