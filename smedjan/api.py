"""The Python API: what `import smedjan` gives, imported from here on first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.raw import RawTensor, specs_of
from smedjan.checkpoint.run_dir import sha256_of
from smedjan.data.collate import IGNORE, Batch
from smedjan.errors import ConfigError, DataError
from smedjan.evaluate.run import EvalReport, evaluate
from smedjan.generate.loop import generate
from smedjan.generate.sampling import Sampling
from smedjan.hf.export import save_model
from smedjan.hf.import_model import ImportReport, import_model
from smedjan.hf.load import ModelFiles, open_model, open_session, resolve
from smedjan.hf.new_tokens import files_of
from smedjan.hf.parity import ParityReport, parity
from smedjan.hf.peft import MergeReport, merged_weights, read_adapter
from smedjan.hf.tokenizer import Tokenizer, load_tokenizer
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
        names = list(self.session.parameters) if wrt is None else list(wrt)
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
    adapter: str | Path | None = None,
    attention: str = "sdpa",
    quantize: str | None = None,
) -> Model:
    """A model directory, run directory or hub id, on a backend. A run of LoRA is loaded with its base.

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
    base, laid = resolve(path, adapter)
    files = open_model(base, laid)
    session = open_session(files, chosen, dtype=dtype, attention=attention, adapter=laid, int8=quantize is not None)
    return Model(files, session)


def merge(base: str | Path, adapter: str | Path, out: str | Path, *, dtype: str | None = None) -> MergeReport:
    """A new model directory with the adapter's product added to the weights, in float32, rounded once.

    Embeddings and heads that the adapter holds whole replace the base's, and so does its tokenizer with new tokens.
    The base is the model as it is stored, also for an adapter that was trained on its 4-bit weights (`qlora`).
    """
    files = open_model(base, Path(adapter))
    lora, tensors = read_adapter(Path(adapter))
    chosen = dtype or files.dtype
    weights, merged, largest = merged_weights(files.tensors, lora, tensors, chosen)
    made = {} if files.own_tokenizer is None else files_of(files.own_tokenizer)
    save_model(Path(out), files.data, weights, files.path, extra_files=made)
    return MergeReport(
        out=str(out), dtype=chosen, merged=merged, largest_change=largest, weights_sha256=sha256_of(weights)
    )


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
