"""The header of a run: all that decides it, before its first step. One event of the log, one table on the terminal."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import TYPE_CHECKING, Any

from smedjan.checkpoint.raw import specs_of
from smedjan.runtime.session import bucket_rows
from smedjan.train.largest import largest_program
from smedjan.train.log import now
from smedjan.train.meter import Meter
from smedjan.train.outline import planned_bytes
from smedjan.train.step import Trainer

if TYPE_CHECKING:
    from smedjan.train.parts import Finetune

Header = dict[str, Any]


def header(parts: Finetune, trainer: Trainer, meter: Meter, start: int) -> Header:
    """As JSON says it. `plan_hash` is of the next micro-batch's program, `planned_bytes` of the largest one's."""
    config, session, steps = parts.config, trainer.session, parts.steps
    flags = config.to_dict()
    parameters = sum(spec.numel for spec in specs_of(parts.files.tensors).values())
    specs = session.specs()
    trained = sum(prod(specs[name][0]) for name in trainer.names)
    added = 0 if parts.lora is None else trained
    batch = steps.batches_for_step(min(start, steps.total - 1))[0]
    rows = 0 if parts.backend.exact else len(bucket_rows(batch.labels.reshape(-1)))
    program = session.micro_program(session.form(batch, rows=rows), trainer.names)
    largest = [largest_program(parts, trainer, accumulate=more) for more in (False, True)[: steps.grad_accum]]
    session.reserve(largest[0])
    dataset = parts.dataset
    return {
        "model": {
            "path": config.model,
            "model_type": parts.files.data.get("model_type"),
            "parameters": parameters,
            "dtype": session.dtype,
        },
        "trained": {"method": config.method, "parameters": trained, "share": trained / (parameters + added)},
        "lora": None if parts.lora is None else {**flags["lora"], "targets": list(parts.lora.targets)},
        "rows": {
            **asdict(parts.tokenized.counts),
            "trained_share": dataset.trained_tokens / dataset.tokens,
            "eval": 0 if parts.eval_dataset is None else len(parts.eval_dataset),
        },
        "steps": {
            "total": steps.total,
            "done": start,
            "epochs": steps.total * steps.rows_per_step / steps.units_per_epoch,
            "rows_per_epoch": steps.units_per_epoch,
            "batch_size": steps.batch_size,
            "grad_accum": steps.grad_accum,
            "packing": steps.packing,
            "max_length": parts.max_length,
            "tokens_per_step": dataset.tokens * steps.rows_per_step / steps.units_per_epoch,
        },
        "optim": flags["optim"],
        "seed": config.seed,
        "backend": parts.backend.name,
        "device": parts.backend.device,
        "exact": parts.backend.exact,
        "plan_hash": program.plan_hash,
        "machine": machine(),
        "processes": trainer.group.world,
        "memory": {
            "planned_bytes": max(planned_bytes(trainer, program, forms=parts.forms) for program in largest),
            "baseline_bytes": meter.baseline_bytes,
            "available_bytes": meter.available_bytes,
        },
        "peak": {"flops": meter.peak_flops, "how": None if meter.peak_flops is None else "measured: a square matmul"},
        "versions": {"smedjan": _version("smedjan"), "python": platform.python_version(), **parts.backend.versions()},
        "config_hash": config.config_hash(),
        "data": str(config.data),
        "started": parts.started,
        "began": now(),
        "out": str(config.out),
    }


def machine() -> dict[str, str]:
    """As `smedjan run history` names it: the host's own name, without the domain that it is in."""
    name = platform.node().partition(".")[0] or "unknown"
    return {"name": name, "system": f"{platform.system()} {platform.machine()}"}


def lines(header: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, what a person reads) of what decides the run: one screen."""
    model, trained, rows, steps, optim, memory = (
        header[key] for key in ("model", "trained", "rows", "steps", "optim", "memory")
    )
    yield "model", f"{model['path']}: {model['model_type']}, {model['parameters']:,} parameters, {model['dtype']}"
    method = f"{trained['method']}, {trained['parameters']:,} parameters ({trained['share']:.2%})"
    if lora := header.get("lora"):
        method += f", rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}"
    yield "trained", method
    counted = ", ".join(
        f"{count:,} {name}" for name, count in rows.items() if name not in ("trained_share", "eval") and count
    )
    held_out = f"; {rows['eval']:,} to evaluate on" if rows["eval"] else ""
    yield "rows", f"{counted}; {rows['trained_share']:.1%} of tokens trained{held_out}"
    resumed = f", {steps['done']:,} of them done" if steps["done"] else ""
    packed = " packed" if steps["packing"] else ""
    accumulated = f" x {steps['grad_accum']}" if steps["grad_accum"] > 1 else ""
    yield (
        "steps",
        f"{steps['total']:,} = {steps['epochs']:.4g} epochs x {steps['rows_per_epoch']:,}{packed} rows / "
        f"({steps['batch_size']}{accumulated}){resumed}; about {steps['tokens_per_step']:,.0f} tokens a step",
    )
    clip = f", clip {optim['clip']:g}" if optim["clip"] else ""
    yield (
        "optimizer",
        f"{optim['name']}, lr {optim['lr']:g} {optim['schedule']}, warm-up {optim['warmup']:g}, "
        f"weight decay {optim['weight_decay']:g}{clip}; seed {header['seed']}",
    )
    exact = "exact" if header["exact"] else "fast"
    yield "runs on", f"{header['backend']} ({exact}) on {header['device']}, plan {header['plan_hash']}"
    planned, before = memory["planned_bytes"], memory["baseline_bytes"]
    available = memory.get("available_bytes")
    left = "" if available is None else f", {_size(available)} available"
    yield "memory", f"{_size(planned)} planned, above {_size(before)} before the model{left}"
    peak = header["peak"]["flops"]
    yield "peak", "unknown on this device" if peak is None else f"{peak / 1e9:,.0f} GFLOP/s, measured by a matmul"
    yield "versions", ", ".join(f"{name} {found}" for name, found in header["versions"].items())
    yield "out", header["out"]


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"
