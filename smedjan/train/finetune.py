"""A whole run: rows to batches, steps, evaluation, checkpoints, resume, and the model at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from smedjan.backends.collective import Collective
from smedjan.checkpoint.atomic import write_atomic
from smedjan.checkpoint.lock import RunLock, request_file
from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.run_dir import Checkpoint, checkpoint_of, load_checkpoint, save_checkpoint, sha256_of
from smedjan.errors import CheckpointError, ConfigError
from smedjan.hf import new_tokens, pissa
from smedjan.hf.export import save_model
from smedjan.hf.hub import Say
from smedjan.hf.peft import WEIGHTS as ADAPTER_WEIGHTS
from smedjan.hf.peft import write_adapter
from smedjan.runtime.select import backend as select_backend
from smedjan.train import adapter, kept
from smedjan.train.asked import asked
from smedjan.train.config import FinetuneConfig
from smedjan.train.eight_bits import Errors, summary
from smedjan.train.evaluation import evaluate_loss
from smedjan.train.fits import warning
from smedjan.train.header import header
from smedjan.train.largest import largest_program
from smedjan.train.log import Event, RunLog, now
from smedjan.train.meter import Meter
from smedjan.train.parts import EIGHT_BITS, Finetune
from smedjan.train.processes import together
from smedjan.train.progress import Progress
from smedjan.train.refused import going_on
from smedjan.train.samples import Samples
from smedjan.train.step import Trainer
from smedjan.train.track import tracked


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


def finetune(
    config: FinetuneConfig, *, on_step: Callable[[Event], None] | None = None, say: Say = lambda line: None
) -> Run:
    """Trains, checkpoints and saves. `on_step` sees every event that the log gets, as it is written; `say` is told what
    the person who waits should know of the data.

    Of several processes (`together`) each makes its micro-batches' gradients; the first logs, saves and speaks.
    """
    assert config.out is not None, "a dry run is `plan`"
    with going_on(config.resume):
        backend = select_backend(config.backend)
    with together(backend) as group, ExitStack() as held:
        if group.rank != 0:
            return _finetune(config, config.out, group, None, None, lambda line: None, held)
        with RunLock(config.out) as lock, tracked(config.train.track, config.out, on_step) as listener:
            return _finetune(config, config.out, group, lock, listener, say, held)


def _finetune(
    config: FinetuneConfig,
    out: Path,
    group: Collective,
    lock: RunLock | None,
    on_step: Callable[[Event], None] | None,
    say: Say,
    held: ExitStack,
) -> Run:
    found = load_checkpoint(out) if out.exists() else None
    if found is not None and config.resume:
        kept.check_same(config)
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
    planned = head["memory"]["planned_bytes"]
    held.enter_context(parts.backend.holding(planned, remedy="--dry-run says with which flags it fits"))
    group.exchange()  # none writes, be it a lock, before all have looked at what is there
    if lock is not None:
        lock.acquire()
    group.exchange()  # a second run in this directory stops all
    log = RunLog(out / "smedjan" / "log.jsonl", start, on_step, speaks=group.rank == 0)
    if group.rank == 0:
        kept.keep(config)
        if found is None:
            adapter.keep_start(out, parts.start)
    leg = {
        "backend": parts.backend.name,
        "from_step": start,
        "plan": trainer.update.plan_hash,
        "processes": group.world,
    }
    history = [*history, leg]
    name = ADAPTER_WEIGHTS if parts.lora is not None else "model.safetensors"

    head["steps"]["again"] = log.again
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
                    "at": now(),
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
        if key == "base_sha256" and found.state.get(key) != value:
            raise CheckpointError(
                f"not the weights that the run in {out} was started over (their {key} is another)",
                file=parts.config.model,
                field="model",
                remedy="give the --model that it was started with, or start a new --out",
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
