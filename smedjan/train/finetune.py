"""A whole run: rows to batches, steps, evaluation, checkpoints, resume, and the model at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from smedjan.checkpoint.atomic import write_atomic
from smedjan.checkpoint.raw import RawTensor, specs_of
from smedjan.checkpoint.run_dir import Checkpoint, checkpoint_of, load_checkpoint, save_checkpoint, sha256_of
from smedjan.checkpoint.sizes import parse_size
from smedjan.data.dataset import Steps, TokenDataset
from smedjan.data.formats import read_rows
from smedjan.data.mask import Tokenized, tokenize_rows
from smedjan.errors import CheckpointError, ConfigError
from smedjan.graph.program import Program
from smedjan.hf.export import save_model
from smedjan.hf.load import ModelFiles, open_model, open_session
from smedjan.hf.peft import WEIGHTS as ADAPTER_WEIGHTS
from smedjan.hf.peft import initial_adapter, write_adapter
from smedjan.hf.tokenizer import load_tokenizer
from smedjan.models.decoder import Form
from smedjan.optim.schedule import factor
from smedjan.passes.lora import Lora
from smedjan.runtime.select import backend as select_backend
from smedjan.runtime.session import ROW_BUCKET
from smedjan.train import fp8
from smedjan.train.asked import asked
from smedjan.train.config import FinetuneConfig
from smedjan.train.evaluation import PAD_TO, evaluate_loss
from smedjan.train.log import Event, RunLog
from smedjan.train.optimizers import optimizer
from smedjan.train.progress import Progress
from smedjan.train.step import Trainer

FP8 = "train.fp8"
"""The field that asks for `fp8`."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step was finished and a checkpoint written."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left behind. `rows` counts kept, truncated and dropped ones; `unstopped` of the kept, uncut ones train
    no stop token; `trained_share` is of all tokens. `skipped` steps had a gradient norm that is not finite.
    `best_step` had the lowest loss of all evaluations, `best_eval_loss`; with patience the weights are of that step."""

    run_dir: Path
    weights_sha256: str
    rows: dict[str, int]
    unstopped: int
    trained_share: float
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

    def __init__(self, config: FinetuneConfig, *, started: str | None = None) -> None:
        self.config = config
        self.started = started or datetime.now(UTC).isoformat(timespec="seconds")
        self.files: ModelFiles = open_model(config.model)
        self.backend = select_backend(config.backend)
        if config.train.fp8:
            fp8.check(self.backend, method=config.method, dtype=config.dtype or self.files.dtype, field=FP8)
        self.tokenizer = load_tokenizer(self.files.path)
        if self.tokenizer.vocab_size > self.files.config.vocab_size:
            raise ConfigError(
                f"{self.tokenizer.vocab_size} tokens for a model of {self.files.config.vocab_size}",
                file=self.files.path / "tokenizer.json",
                remedy="use the tokenizer that belongs to the model",
            )
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
        self.lora = None
        if config.method != "full":
            lora = config.lora
            self.lora = Lora(
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
                targets=lora.targets or self.files.config.linear_layers(),
                layers=self._adapted_layers(lora.last_layers),
                transposed=self.files.config.conv1d,
                ranks=lora.ranks,
                alphas=lora.alphas,
                rslora=lora.rslora,
            )
            shapes = self.lora.shapes(self._shapes)
            names = self.files.config.names
            for module in (f"{names.embedding}.weight", f"{names.head}.weight"):
                if self.lora.matches(module.removesuffix(".weight")):
                    raise ConfigError(
                        f"{module.removesuffix('.weight')!r} takes no adapter",
                        field="lora.targets",
                        remedy="name linear layers of the blocks, such as q_proj",
                    )
            for target in self.lora.targets:
                if not any(f".{target}.lora_A" in name for name in shapes):
                    raise ConfigError(
                        f"no module is called {target!r}",
                        field="lora.targets",
                        remedy="see smedjan graph for the names",
                    )
            for field, pairs in (("lora.rank_pattern", lora.ranks), ("lora.alpha_pattern", lora.alphas)):
                for name, _ in pairs:
                    if not any(f".{name}.lora_A" in adapter for adapter in shapes):
                        raise ConfigError(
                            f"no module with an adapter is called {name!r}",
                            field=field,
                            remedy="see smedjan graph for the names, and --lora.targets",
                        )

    def _adapted_layers(self, last: int | None) -> tuple[int, ...] | None:
        count = self.files.config.num_hidden_layers
        if last is None:
            return None
        if last > count:
            raise ConfigError(
                f"{last} is more than the model's {count} layers",
                field="lora.last_layers",
                remedy=f"give --lora.last-layers {count} or less",
            )
        return tuple(range(count - last, count))

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in specs_of(self.files.tensors).items()}

    def _tokenize(self, path: Path, split: str) -> Tokenized:
        train = self.config.train
        return tokenize_rows(
            read_rows(path, split),
            self.tokenizer,
            max_length=self.max_length,
            loss_on=train.loss_on,
            too_long=train.too_long,
            now=datetime.fromisoformat(self.started),
        )

    def trainer(self) -> Trainer:
        """The session with fresh adapters, and what is trained of it."""
        config = self.config
        session = open_session(
            self.files,
            self.backend,
            dtype=config.dtype,
            attention=config.train.attention,
            quantized=config.method == "qlora",
        )
        session.fp8 = config.train.fp8
        if config.train.memory is not None:
            session.memory = parse_size(config.train.memory, "train.memory")
        names = list(session.parameters)
        if self.lora is not None:
            fresh = initial_adapter(self.lora, self._shapes, config.seed)
            session.parameters.update({name: self.backend.from_raw(raw) for name, raw in fresh.items()})
            session.lora, names = self.lora, list(fresh)
        model = self.files.config
        made = optimizer(
            config.optim,
            config.learning_rate,
            names,
            apart=(model.names.embedding, model.names.head),
            ema=config.train.ema or 0.0,
        )
        return Trainer(session, names, made, seed=config.seed)

    def largest_program(self, trainer: Trainer) -> Program:
        """Of the run's largest micro-batch, planned and not run: as many of the longest rows as it takes."""
        config = self.config.train
        lengths = max(len(example) for example in self.dataset.examples)
        longest = self.max_length if config.packing else lengths
        seq = min(-(-longest // PAD_TO) * PAD_TO, self.max_length)
        trained = max(example.trained_tokens for example in self.dataset.examples) * config.batch_size
        rows = 0 if self.backend.exact else min(-(-trained // ROW_BUCKET) * ROW_BUCKET, seq * config.batch_size)
        form = Form(
            batch=config.batch_size,
            seq=seq,
            dtype=trainer.session.dtype,
            kind="packed" if config.packing else "padded",
            attention=config.attention,
            rows=rows,
            positions=config.batch_size if config.packing else 1,
        )
        return trainer.session.micro_program(form, trainer.names)

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
        }


def finetune(config: FinetuneConfig, *, on_step: Callable[[Event], None] | None = None) -> Run:
    """Trains, checkpoints and saves. `on_step` sees every event that the log gets, as it is written."""
    assert config.out is not None, "a dry run is `plan`"
    out = config.out
    found = load_checkpoint(out) if out.exists() else None
    # A chat template may print the date: a resumed run sees the rows of the day on which it was started.
    parts = Finetune(config, started=None if found is None else found.state.get("started"))
    if out.exists() and not config.resume and (found is not None or any(out.iterdir())):
        raise ConfigError("exists already", file=out, field="out", remedy="give --resume, or another directory")
    parts.backend.reset_peak_memory()
    trainer = parts.trainer()
    start = 0
    history: list[Event] = []
    progress = Progress.of({} if found is None else found.state)
    if found is not None:
        start, history = _resume(parts, trainer, found, out)
    errors = _fp8_errors(parts, trainer, start)
    log = RunLog(out / "smedjan" / "log.jsonl", start, on_step)
    leg = {"backend": parts.backend.name, "from_step": start, "plan": trainer.update.plan_hash}
    history = [*history, leg]
    name = ADAPTER_WEIGHTS if parts.lora is not None else "model.safetensors"

    if errors:
        log.write({"step": start, "fp8": fp8.summary(errors)})

    def save(step: int) -> None:
        save_checkpoint(
            out,
            step,
            weights=trainer.weights(),
            optimizer=trainer.optimizer_state(),
            state={**parts.state(history), "progress": progress.to_state()},
            weights_name=name,
            keep=config.train.keep,
            best=progress.best_step if config.train.patience is not None else None,
        )

    eval_loss, done = None, start
    most_bytes = parts.largest_program(trainer).peak_bytes if parts.eval_dataset is not None else None
    with asked() as wanted:
        for step in range(start, start if progress.stopped_early else parts.steps.total):
            batches = parts.steps.batches_for_step(step)
            lr, began = parts.learning_rate(step), time.perf_counter()
            loss, norm = trainer.step(batches, number=step + 1, lr=lr, taken=step + 1 - progress.skipped)
            done = step + 1
            last, better = done == parts.steps.total, False
            progress.after_step(done, loss, norm, max_skipped=config.optim.max_skipped, last=last)
            tokens, seconds = sum(b.tokens for b in batches), time.perf_counter() - began
            log.write(
                {
                    "step": step + 1,
                    "total_steps": parts.steps.total,
                    "loss": loss,
                    "grad_norm": norm,
                    "lr": lr,
                    "tokens": tokens,
                    "trained_tokens": sum(b.trained_tokens for b in batches),
                    "tokens_per_s": tokens / seconds,
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
                    )
                better = progress.after_evaluation(
                    done, eval_loss, patience=config.train.patience, min_delta=config.train.min_delta
                )
                better = better and config.train.patience is not None
                log.write({"step": done, "eval_loss": eval_loss, **progress.best()})
                last = last or progress.stopped_early
            if last or better or wanted.stop or wanted.save_now() or _due(config.train.save_every, step):
                save(step + 1)
            if wanted.stop and not last:
                raise Interrupted(f"stopped after step {step + 1}; go on with --resume")
            if last:
                break
    if config.train.patience is not None and progress.best_step not in (None, done):
        best = checkpoint_of(out, progress.best_step)
        trainer.restore(best.weights, best.optimizer)
    with trainer.averaged():
        weights = trainer.weights()
    _save_result(parts, weights, out)
    examples = parts.tokenized
    plan_hash = next(iter(trainer.session.programs.values())).plan_hash if trainer.session.programs else ""
    counts = examples.counts
    run = Run(
        run_dir=out,
        weights_sha256=sha256_of(weights),
        rows={"kept": counts.kept, "truncated": counts.truncated, "dropped": counts.dropped},
        unstopped=counts.unstopped,
        trained_share=parts.dataset.trained_tokens / parts.dataset.tokens,
        steps=done,
        backend=parts.backend.name,
        exact=parts.backend.exact,
        plan_hash=plan_hash,
        eval_loss=eval_loss,
        skipped=progress.skipped,
        **progress.best(),
    )
    _write_plan(trainer, out / "smedjan" / "plan.json", run, errors)
    return run


def _due(every: int, step: int) -> bool:
    return every > 0 and (step + 1) % every == 0


def _resume(parts: Finetune, trainer: Trainer, found: Checkpoint, out: Path) -> tuple[int, list[Event]]:
    for key, value in parts.state([]).items():
        if key != "history" and found.state.get(key) != value:
            raise CheckpointError(
                f"the run was started with another {key}",
                file=found.path / "smedjan" / "state.json",
                field=key,
                remedy="resume with the same data, seed and flags, or start a new --out",
            )
    trainer.restore(found.weights, found.optimizer)
    return found.step, list(found.state.get("history", []))


def _save_result(parts: Finetune, weights: Mapping[str, RawTensor], out: Path) -> None:
    if parts.lora is None:
        save_model(out, parts.files.data, weights, parts.files.path, into_run=True)
        return
    write_adapter(out, parts.lora, weights, base=str(parts.config.model))


def _fp8_errors(parts: Finetune, trainer: Trainer, start: int) -> fp8.Errors:
    """Of the first batch from step `start` on (the last step's, where none is left to do), with the weights there."""
    if not parts.config.train.fp8:
        return {}
    batches = parts.steps.batches_for_step(min(start, parts.steps.total - 1))
    return fp8.of_batch(trainer.session, batches[0], trainer.names, field=FP8)


def _write_plan(trainer: Trainer, file: Path, run: Run, errors: fp8.Errors) -> None:
    """What ran on what: the first micro-batch's program (a resumed run that was done already has none), the update."""
    micro = next(iter(trainer.session.programs.values()), None)
    ops = [*(micro.lowerings() if micro is not None else ()), *trainer.update.lowerings()]
    plan = {"backend": run.backend, "exact": run.exact, "plan_hash": run.plan_hash, "ops": ops}
    if errors:
        plan["fp8"] = errors
    write_atomic(file, (json.dumps(plan, indent=2) + "\n").encode())
