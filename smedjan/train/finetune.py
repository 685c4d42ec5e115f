"""A whole run: rows to batches, steps, evaluation, checkpoints, resume, and the model at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from smedjan.backends.base import Forms
from smedjan.backends.collective import Collective
from smedjan.checkpoint.atomic import write_atomic
from smedjan.checkpoint.lock import RunLock, request_file
from smedjan.checkpoint.raw import RawTensor, specs_of
from smedjan.checkpoint.run_dir import Checkpoint, checkpoint_of, load_checkpoint, save_checkpoint, sha256_of
from smedjan.checkpoint.sizes import parse_size
from smedjan.data.cache import tokenize_file
from smedjan.data.dataset import Steps, TokenDataset
from smedjan.data.formats import conversion, left_out
from smedjan.data.mask import Tokenized
from smedjan.errors import CheckpointError, ConfigError
from smedjan.hf import new_tokens, pissa
from smedjan.hf.dataset_hub import data_path
from smedjan.hf.export import save_model
from smedjan.hf.hub import Say
from smedjan.hf.load import ModelFiles, computed_dtype, open_model, open_session
from smedjan.hf.peft import WEIGHTS as ADAPTER_WEIGHTS
from smedjan.hf.peft import initial_adapter, write_adapter
from smedjan.hf.tokenizer import load_tokenizer
from smedjan.hf.whole_modules import parameters_named
from smedjan.optim.base import Optimizer
from smedjan.optim.schedule import factor
from smedjan.passes.lora import Lora
from smedjan.runtime.select import backend as select_backend
from smedjan.runtime.session import Session
from smedjan.train import adapter, fp8, int8_forward
from smedjan.train.adapted import adapters
from smedjan.train.asked import asked
from smedjan.train.chosen import check_method, chosen
from smedjan.train.config import FinetuneConfig
from smedjan.train.eight_bits import Errors, summary
from smedjan.train.evaluation import PAD_TO, evaluate_loss
from smedjan.train.fits import warning
from smedjan.train.header import header
from smedjan.train.largest import forms_met, largest_program
from smedjan.train.log import Event, RunLog
from smedjan.train.meter import Meter
from smedjan.train.optimizers import optimizer
from smedjan.train.outline import Outline
from smedjan.train.processes import together
from smedjan.train.progress import Progress
from smedjan.train.samples import Samples
from smedjan.train.step import Trainer
from smedjan.train.track import tracked

EIGHT_BITS = (fp8.FP8, int8_forward.INT8_FORWARD)
"""Products of 8 bits that a run can ask for."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step was finished and a checkpoint written."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left behind. `rows` counts kept, truncated, dropped and broken ones; `unstopped` of the kept, uncut
    ones train no stop token; `trained_share` is of all tokens; `converted`: what the rows were converted from and to;
    `skipped` steps had a gradient norm that is not finite. `best_step` had the lowest loss of all evaluations,
    `best_eval_loss`; with patience the weights are of that step."""

    run_dir: Path
    weights_sha256: str
    rows: dict[str, int]
    unstopped: int
    trained_share: float
    converted: dict[str, str] | None
    steps: int
    backend: str
    exact: bool
    plan_hash: str
    eval_loss: float | None
    skipped: int
    best_step: int | None
    best_eval_loss: float | None
    stopped_early: bool


class Finetune:
    """The parts of a run, made and checked before anything is written."""

    def __init__(self, config: FinetuneConfig, *, started: str | None = None, say: Say = lambda line: None) -> None:
        self.config, self.say = config, say
        self.started = started or datetime.now(UTC).isoformat(timespec="seconds")
        self.files: ModelFiles = open_model(config.model)
        self.backend = select_backend(config.backend)
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

    def _add_tokens(self, tokens: tuple[str, ...]) -> None:
        self.tokenizer, ids = new_tokens.with_tokens(self.tokenizer, tokens)
        self.tokenizer_files = new_tokens.tokenizer_files(self.tokenizer, tokens, ids)
        self.files = new_tokens.with_rows(self.files, ids, self.config.seed)

    def _whole_modules(self) -> tuple[str, ...]:
        """The weights that are trained whole beside adapters: those asked for, and those that have new rows."""
        model = self.files.config
        asked = parameters_named(self.config.lora.modules_to_save or (), model, "lora.modules_to_save")
        grown = (model.embedding, model.head) if self.tokenizer_files else ()
        return tuple(name for name in dict.fromkeys((model.embedding, model.head)) if name in (*asked, *grown))

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
            quantized=config.storage,
        )
        self._set(session)
        if config.train.int8_forward:
            int8_forward.lay(session)
        if self.lora is not None:
            fresh = {**initial_adapter(self.lora, self._shapes, config.seed), **self.start}
            session.parameters.update({name: self.backend.from_raw(raw) for name, raw in fresh.items()})
            session.parameters.update(adapter.first_magnitudes(session, group))
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
            quantized=model.linear_weights() if config.storage else (),
            storage=config.storage or "nf4",
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
        """Of the weights a run starts from: adapters of one base mean nothing over another."""
        return sha256_of(self.files.tensors)

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


def finetune(
    config: FinetuneConfig, *, on_step: Callable[[Event], None] | None = None, say: Say = lambda line: None
) -> Run:
    """Trains, checkpoints and saves. `on_step` sees every event that the log gets, as it is written; `say` is told what
    the person who waits should know of the data.

    Of several processes (`together`) each makes its micro-batches' gradients; the first logs, saves and speaks.
    """
    assert config.out is not None, "a dry run is `plan`"
    with together(select_backend(config.backend)) as group:
        if group.rank != 0:
            return _finetune(config, config.out, group, None, None, lambda line: None)
        with RunLock(config.out) as lock, tracked(config.train.track, config.out, on_step) as listener:
            return _finetune(config, config.out, group, lock, listener, say)


def _finetune(
    config: FinetuneConfig,
    out: Path,
    group: Collective,
    lock: RunLock | None,
    on_step: Callable[[Event], None] | None,
    say: Say,
) -> Run:
    found = load_checkpoint(out) if out.exists() else None
    # A chat template may print the date: a resumed run sees the rows of the day on which it was started.
    parts = Finetune(config, started=None if found is None else found.state.get("started"), say=say)
    if out.exists() and not config.resume and (found is not None or any(out.iterdir())):
        raise ConfigError("exists already", file=out, field="out", remedy="give --resume, or another directory")
    if parts.starts_apart:
        parts.start = adapter.shared(group, lambda: parts.start) if found is None else adapter.read_start(out)
    meter = Meter(parts.backend, config.dtype or parts.files.dtype, parts.memory)
    samples = Samples(parts) if config.train.sample_every and group.rank == 0 else None
    trainer = parts.trainer(group)
    start = 0
    history: list[Event] = []
    progress = Progress.of({} if found is None else found.state)
    if found is not None:
        start, history = _resume(parts, trainer, found, out)
    errors = _errors(parts, trainer, start)
    head = header(parts, trainer, meter, start)
    if said := warning(head["memory"]["planned_bytes"], meter.available_bytes):
        say(said)
    if lock is not None:
        lock.acquire()
    group.exchange()  # none writes before all have looked at what is there
    log = RunLog(out / "smedjan" / "log.jsonl", start, on_step, speaks=group.rank == 0)
    if found is None and group.rank == 0:
        adapter.keep_start(out, parts.start)
    leg = {
        "backend": parts.backend.name,
        "from_step": start,
        "plan": trainer.update.plan_hash,
        "processes": group.world,
    }
    history = [*history, leg]
    name = ADAPTER_WEIGHTS if parts.lora is not None else "model.safetensors"

    log.write({"step": start, "header": head})
    for key, found_errors in errors.items():
        log.write({"step": start, key: summary(found_errors)})

    def save(step: int) -> None:
        save_checkpoint(
            out,
            step,
            weights=trainer.weights() if group.rank == 0 else {},
            optimizer=trainer.optimizer_state(),
            state={**parts.state(history), "progress": progress.to_state()},
            weights_name=name,
            keep=config.train.keep,
            peers=group,
            best=progress.best_step if config.train.patience is not None else None,
        )

    eval_loss, done = None, start
    most_bytes = None if parts.eval_dataset is None else largest_program(parts, trainer).peak_bytes
    with asked(request_file(out), several=group.world > 1) as wanted:
        for step in range(start, start if progress.stopped_early else parts.steps.total):
            batches = parts.steps.batches_for_step(step, group.world)
            lr = parts.learning_rate(step)
            meter.start(trainer.session)
            loss, norm = trainer.step(batches, number=step + 1, lr=lr, taken=step + 1 - progress.skipped)
            done, last, better = step + 1, step + 1 == parts.steps.total, False
            progress.after_step(done, loss, norm, max_skipped=config.optim.max_skipped, last=last)
            tokens = sum(b.tokens for b in batches)
            log.write(
                {
                    "step": step + 1,
                    "total_steps": parts.steps.total,
                    "loss": loss,
                    "grad_norm": norm,
                    "lr": lr,
                    "tokens": tokens,
                    "trained_tokens": sum(b.trained_tokens for b in batches),
                    **meter.stop(trainer.session, tokens=tokens, left=parts.steps.total - step - 1),
                    "peak_bytes": parts.backend.peak_memory(),
                    "skipped": progress.skipped,
                }
            )
            if parts.eval_dataset is not None and (last or _due(config.train.eval_every, step)):
                with trainer.averaged():
                    eval_loss = evaluate_loss(
                        trainer.session,
                        parts.eval_dataset,
                        batch_size=config.train.batch_size,
                        max_length=parts.max_length,
                        most_bytes=most_bytes,
                        group=group,
                    )
                better = progress.after_evaluation(done, eval_loss, config.train)
                log.write({"step": done, "eval_loss": eval_loss, **progress.best()})
                last = last or progress.stopped_early
            if samples is not None and (last or _due(config.train.sample_every, step)):
                log.write({"step": step + 1, "samples": samples(trainer.session)})
            stop, save_now = wanted.agreed(group)
            if last or better or stop or save_now or _due(config.train.save_every, step):
                save(step + 1)
                wanted.saved()
            if stop and not last:
                raise Interrupted(f"stopped after step {step + 1}; go on with --resume")
            if last:
                break
    if config.train.patience is not None and progress.best_step not in (None, done):
        best = checkpoint_of(out, progress.best_step)
        trainer.restore(best.weights, best.optimizer)
    with trainer.averaged():
        trained = trainer.weights() if parts.lora is not None else trainer.all_weights()
        weights = _save_result(parts, trained, out, group)
    examples = parts.tokenized
    plan_hash = next(iter(trainer.session.programs.values())).plan_hash if trainer.session.programs else ""
    run = Run(
        run_dir=out,
        weights_sha256=sha256_of(weights),
        rows=examples.counts.rows,
        unstopped=examples.counts.unstopped,
        trained_share=parts.dataset.trained_tokens / parts.dataset.tokens,
        converted=examples.converted,
        steps=done,
        backend=parts.backend.name,
        exact=parts.backend.exact,
        plan_hash=plan_hash,
        eval_loss=eval_loss,
        skipped=progress.skipped,
        **progress.best(),
    )
    if group.rank == 0:
        _write_plan(trainer, out / "smedjan" / "plan.json", run, errors)
    group.exchange()  # what one process returns from is there for all
    return run


def _due(every: int, step: int) -> bool:
    return every > 0 and (step + 1) % every == 0


def _resume(parts: Finetune, trainer: Trainer, found: Checkpoint, out: Path) -> tuple[int, list[Event]]:
    for key, value in parts.state([]).items():
        if key == "data_sha256" and found.state.get(key) != value:
            raise CheckpointError(
                f"the rows are not those that the run in {out} was started with (sha256 of their tokens)",
                file=parts.config.data,
                field="data",
                remedy="bring back the file as it was, or start a new --out",
            )
        if key != "history" and found.state.get(key) != value:
            raise CheckpointError(
                f"the run was started with another {key}",
                file=found.path / "smedjan" / "state.json",
                field=key,
                remedy="resume with the same data, seed and flags, or start a new --out",
            )
    trainer.restore(found.weights, found.optimizer)
    return found.step, list(found.state.get("history", []))


def _save_result(
    parts: Finetune, weights: Mapping[str, RawTensor], out: Path, group: Collective
) -> Mapping[str, RawTensor]:
    """Writes (the first process does) and gives what stays: an adapter is always one of the base as it is stored."""
    lora = parts.lora
    if lora is not None and parts.start:
        lora, weights = pissa.plain(lora, weights, parts.start)
    if group.rank > 0:
        return weights
    made = parts.tokenizer_files
    if lora is None:
        save_model(out, parts.files.data, weights, parts.files.path, extra_files=made, into_run=True)
        return weights
    if made:
        for name, content in {**new_tokens.files_of(parts.files.path), **made}.items():
            write_atomic(out / name, content)
    trained, tied = adapter.trained_on(parts.config, parts.files), parts.files.config.tied()
    write_adapter(out, lora, weights, base=str(parts.config.model), tied=tied, trained=trained)
    return weights


def _errors(parts: Finetune, trainer: Trainer, start: int) -> dict[str, Errors]:
    """Of layers in 8 bits, {key: errors}: on the first batch from step `start` on (the last step's, where none is left
    to do), with the weights there."""
    batches = parts.steps.batches_for_step(min(start, parts.steps.total - 1))
    return {
        way.key: way.of_batch(trainer.session, batches[0], trainer.names, field=f"train.{way.key}")
        for way in EIGHT_BITS
        if getattr(parts.config.train, way.key)
    }


def _write_plan(trainer: Trainer, file: Path, run: Run, errors: Mapping[str, Errors]) -> None:
    """What ran on what: the first micro-batch's program (a resumed run that was done already has none), the update."""
    micro = next(iter(trainer.session.programs.values()), None)
    ops = [*(micro.lowerings() if micro is not None else ()), *trainer.update.lowerings()]
    plan = {"backend": run.backend, "exact": run.exact, "plan_hash": run.plan_hash, "ops": ops, **errors}
    write_atomic(file, (json.dumps(plan, indent=2) + "\n").encode())
