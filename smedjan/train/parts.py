"""The parts of a fine-tuning run: model, rows, steps, and what is trained how, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from datetime import datetime
from functools import cached_property
from pathlib import Path

from smedjan.backends.base import Forms
from smedjan.backends.collective import Collective
from smedjan.checkpoint.raw import RawTensor, specs_of
from smedjan.checkpoint.run_dir import sha256_of
from smedjan.checkpoint.sizes import parse_size
from smedjan.data.cache import tokenize_file
from smedjan.data.dataset import Steps, TokenDataset
from smedjan.data.formats import conversion, left_out
from smedjan.data.mask import Tokenized
from smedjan.errors import ConfigError
from smedjan.hf import new_tokens, pissa
from smedjan.hf.dataset_hub import data_path
from smedjan.hf.hub import Say
from smedjan.hf.load import ModelFiles, computed_dtype, open_model, open_session
from smedjan.hf.peft import initial_adapter
from smedjan.hf.tokenizer import load_tokenizer
from smedjan.hf.whole_modules import parameters_named
from smedjan.optim.base import Optimizer
from smedjan.optim.schedule import factor
from smedjan.passes.lora import Lora
from smedjan.runtime.select import backend as select_backend
from smedjan.runtime.session import Session
from smedjan.train import adapter, fp8, int8_forward
from smedjan.train.adapted import adapters
from smedjan.train.chosen import check_method, chosen
from smedjan.train.config import FinetuneConfig
from smedjan.train.evaluation import PAD_TO
from smedjan.train.largest import forms_met
from smedjan.train.log import Event, now
from smedjan.train.optimizers import optimizer
from smedjan.train.outline import Outline
from smedjan.train.refused import going_on
from smedjan.train.step import Trainer

EIGHT_BITS = (fp8.FP8, int8_forward.INT8_FORWARD)
"""Products of 8 bits that a run can ask for."""


IMPORT_FIRST = "write the weights out first: smedjan import DIR OUT"


def check_affine(config: FinetuneConfig, files: ModelFiles) -> None:
    """What goes with a base in MLX's format: adapters beside its codes, which stay as they are."""
    if config.method != "qlora":
        raise ConfigError(
            f"{files.path.name} holds its weights in few bits: not for the method {config.method}",
            field="method",
            remedy=f"give --method qlora, or {IMPORT_FIRST}",
        )
    if config.lora.bits != 4:  # the default, which is not told from a 4 that was given
        raise ConfigError(
            f"is {config.lora.bits}, and the base is in few bits already", field="lora.bits", remedy="leave it out"
        )
    if config.lora.init != "random":
        raise ConfigError(
            f"{config.lora.init} takes its start out of the weights, which are in few bits",
            field="lora.init",
            remedy=f"leave it out, or {IMPORT_FIRST}",
        )
    if config.train.new_tokens is not None:
        raise ConfigError("needs new rows of a table in few bits", field="train.new_tokens", remedy=IMPORT_FIRST)


class Finetune:
    """The parts of a run, made and checked before anything is written."""

    def __init__(self, config: FinetuneConfig, *, started: str | None = None, say: Say = lambda line: None) -> None:
        self.config, self.say = config, say
        self.started = started or now()
        self.stored: ModelFiles = open_model(config.model)
        self.files = self.stored
        self.backend = select_backend(config.backend)
        if self.files.affine:
            check_affine(config, self.files)
        with going_on(config.resume):
            self._check_eight_bits()
        self.tokenizer = load_tokenizer(self.files.path)
        if self.tokenizer.vocab_size > self.files.config.vocab_size:
            raise ConfigError(
                f"{self.tokenizer.vocab_size} tokens for a model of {self.files.config.vocab_size}",
                file=self.files.path / "tokenizer.json",
                remedy="use the tokenizer that belongs to the model",
            )
        self.tokenizer_files: dict[str, bytes] = {}
        if config.train.new_tokens is not None:
            self._add_tokens(config.train.new_tokens)
        self.max_length = config.train.max_length_for(self.files.config.max_position_embeddings)
        self.tokenized = self._tokenize(config.data, "train")
        self.dataset = TokenDataset(self.tokenized.examples)
        self.eval_dataset = None
        if config.eval_data is not None:
            self.eval_dataset = TokenDataset(self._tokenize(config.eval_data, "valid").examples)
        train = config.train
        self.steps: Steps = self.dataset.steps(
            seed=config.seed,
            batch_size=train.batch_size,
            grad_accum=train.grad_accum,
            epochs=train.epochs,
            steps=train.steps,
            packing=train.packing,
            max_length=self.max_length,
            pad_to=PAD_TO,
        )
        self._choose()

    def _choose(self) -> None:
        """What is trained: parameters of the model (`names`), or adapters beside it, with some modules (`whole`)."""
        config, model = self.config, self.files.config
        check_method(config.train, config.method)
        grown = (model.embedding, model.head) if self.tokenizer_files else ()
        self.names = chosen(list(self._shapes), config.train, model.tied(), grown=grown)
        self.lora: Lora | None = None
        self.whole: tuple[str, ...] = ()
        if config.method != "full":
            self.whole = self._whole_modules()
            self.lora = adapters(config.lora, model, self._shapes)

    @cached_property
    def forms(self) -> Forms:
        """Of the run's micro-batches: how many programs it needs."""
        return forms_met(self.steps)

    def changed(self, config: FinetuneConfig) -> Finetune:
        """These rows and this model under other flags of size, method and optimizer, to plan what they would need: no
        row is read again, and `steps` stay what they were."""
        other = copy(self)
        other.config = config
        other.__dict__.pop("outline", None)
        other._check_eight_bits()
        other.max_length = config.train.max_length_for(self.files.config.max_position_embeddings)
        other._choose()
        return other

    def _check_eight_bits(self) -> None:
        config, model = self.config, self.files
        if config.train.fp8:
            fp8.check(self.backend, method=config.method, dtype=config.dtype or model.dtype, field="train.fp8")
        if config.train.int8_forward:
            int8_forward.check(self.backend, model.config, method=config.method, field="train.int8_forward")

    @property
    def storage(self) -> str | None:
        """What the run holds weights as; None: as they are stored, be that in few bits."""
        return None if self.files.affine else self.config.storage

    def _add_tokens(self, tokens: tuple[str, ...]) -> None:
        self.tokenizer, ids = new_tokens.with_tokens(self.tokenizer, tokens)
        self.tokenizer_files = new_tokens.tokenizer_files(self.tokenizer, tokens, ids)
        self.files = new_tokens.with_rows(self.files, ids, self.config.seed)

    def _whole_modules(self) -> tuple[str, ...]:
        """The weights that are trained whole beside adapters: those asked for, and those that have new rows."""
        model = self.files.config
        asked = parameters_named(self.config.lora.modules_to_save or (), model, "lora.modules_to_save")
        grown = (model.embedding, model.head) if self.tokenizer_files else ()
        whole = tuple(name for name in dict.fromkeys((model.embedding, model.head)) if name in (*asked, *grown))
        for name in whole:
            if name in self.stored.affine:
                raise ConfigError(
                    f"{name} is in few bits, which are not trained", field="lora.modules_to_save", remedy=IMPORT_FIRST
                )
        return whole

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in specs_of(self.files.tensors).items()}

    def _tokenize(self, path: Path, split: str) -> Tokenized:
        train = self.config.train
        path = data_path(path, split, self.say)
        made = tokenize_file(
            path,
            split,
            self.tokenizer,
            max_length=self.max_length,
            loss_on=train.loss_on,
            too_long=train.too_long,
            broken=train.broken,
            now=datetime.fromisoformat(self.started),
            say=self.say,
        )
        if said := conversion(made.converted):
            self.say(f"{path}: {said}")
        if said := left_out(made.counts.broken, made.first_broken):
            self.say(said)
        return made

    def trainer(self, group: Collective | None = None) -> Trainer:
        """The session with fresh adapters, and what is trained of it."""
        config = self.config
        session = open_session(
            adapter.files_under(self.files, self.lora, self.start),
            self.backend,
            dtype=config.dtype,
            attention=config.train.attention,
            quantized=self.storage,
        )
        self._set(session)
        if config.train.int8_forward:
            int8_forward.lay(session)
        if self.lora is not None:
            fresh = {**initial_adapter(self.lora, self._shapes, config.seed), **self.start}
            session.parameters.update({name: self.backend.from_raw(raw) for name, raw in fresh.items()})
            session.parameters.update(adapter.first_magnitudes(session, group))
        with going_on(config.resume):
            return Trainer(session, self.trained, self._optimizer(), seed=config.seed, group=group)

    @cached_property
    def outline(self) -> Outline:
        """The same without an array: nothing is read or computed."""
        config, model = self.config, self.files.config
        session = Session(
            self.backend,
            model,
            {},
            computed_dtype(self.files, config.dtype),
            attention=config.train.attention,
            quantized=model.linear_weights() if self.storage else (),
            storage=self.storage or "nf4",
            affine=self.files.affine,
        )
        self._set(session)
        return Outline(session=session, names=self.trained, optimizer=self._optimizer())

    def _set(self, session: Session) -> None:
        train = self.config.train
        session.lora, session.fp8 = self.lora, train.fp8
        session.z_loss, session.label_smoothing, session.neftune = train.z_loss, train.label_smoothing, train.neftune
        session.memory = self.memory
        if train.int8_forward:
            session.w8a8 = session.config.linear_weights()

    @property
    def memory(self) -> int | None:
        """Bytes that the flags give the run."""
        given = self.config.train.memory
        return None if given is None else parse_size(given, "train.memory")

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the parameters that are trained, adapters in the order of PEFT's: the embedding first, a head
        last."""
        if self.lora is None:
            return tuple(self.names)
        head = [name for name in self.whole if name != self.files.config.embedding]
        first = [name for name in self.whole if name not in head]
        return (*first, *self.lora.shapes(self._shapes), *head)

    def _optimizer(self) -> Optimizer:
        config, model = self.config, self.files.config.names
        ema = config.train.ema or 0.0
        return optimizer(config.optim, config.learning_rate, self.trained, apart=(model.embedding, model.head), ema=ema)

    def learning_rate(self, step: int) -> float:
        """Of `step`, counted from 0. Warm-up ends at the peak; its first step is not zero, unlike transformers'."""
        optim = self.config.optim
        warmup = optim.warmup_steps(self.steps.total)
        if step < warmup:
            return self.config.learning_rate * ((step + 1) / warmup)
        return self.config.learning_rate * factor(
            optim.schedule, step, total=self.steps.total, warmup=warmup, cycles=optim.cycles
        )

    @cached_property
    def start(self) -> Mapping[str, RawTensor]:
        """Adapters that start as a part of their weights, which the base then lacks; empty where none do."""
        if not self.starts_apart:
            return {}
        assert self.lora is not None
        return pissa.initial(self.lora, self.files.tensors, self.config.lora.init, self.config.seed)

    @property
    def starts_apart(self) -> bool:
        return self.lora is not None and self.config.lora.init != "random"

    @cached_property
    def base_sha256(self) -> str:
        """Of the weights a run starts from: adapters of one base mean nothing over another. Rows of new tokens are not
        of it: they are trained, so that checkpoints have them, and another processor draws other last bits."""
        return sha256_of(self.stored.tensors)

    def state(self, history: list[Event]) -> Event:
        watched = self.eval_dataset if self.config.train.patience is not None else None
        return {
            **({} if watched is None else {"eval_sha256": watched.fingerprint()}),
            "config_hash": self.config.config_hash(),
            "data_sha256": self.dataset.fingerprint(),
            "base_sha256": self.base_sha256,
            "seed": self.config.seed,
            "total_steps": self.steps.total,
            "method": self.config.method,
            "started": self.started,
            "history": history,
            **({"start_sha256": sha256_of(self.start)} if self.start else {}),
        }
