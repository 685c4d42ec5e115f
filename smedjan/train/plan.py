"""What a run will do, before it does it: parameters, FLOPs, memory, and the lowering of each op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from smedjan.backends.base import Backend
from smedjan.checkpoint.raw import specs_of
from smedjan.errors import BackendError, ConfigError
from smedjan.graph.op import Cost
from smedjan.graph.program import Program
from smedjan.hf.hub import Say
from smedjan.models.decoder import Form
from smedjan.models.decoder_config import DecoderConfig
from smedjan.ops.quantized import Affine
from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora
from smedjan.runtime.session import Session, fills_window
from smedjan.train import fits
from smedjan.train import fp8 as floats
from smedjan.train import int8_forward as integers
from smedjan.train.config import FinetuneConfig
from smedjan.train.estimate import Estimate, step_time
from smedjan.train.largest import largest_form
from smedjan.train.macs import Mac, macs
from smedjan.train.outline import Outline, planned_bytes
from smedjan.train.parts import EIGHT_BITS, Finetune


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    planned_bytes     what the run takes above its imported libraries, in its largest micro-batch or its update
    memory_available  bytes that it may take; None: unknown, and so are `fits`, `longest_row` and `advice`
    step_seconds      of one optimizer step of the largest micro-batches; None: not to be had on this machine
    longest_row       tokens with which it would fit, up to the model's context; 0: none
    advice            flags that make it fit at the least cost, and what is planned with them; None: it fits, or none do
    macs              which of them the run would fit into, on mlx_metal; empty elsewhere
    fp8, int8_forward  errors of the layers in 8-bit floats and integers, on normal inputs; empty where there are none
    """

    parameters: int
    trained_parameters: int
    nodes: int
    flops_per_token: int
    planned_bytes: int
    memory_available: int | None
    fits: bool | None
    advice: str | None
    longest_row: int | None
    step_seconds: float | None
    batch: dict[str, int]
    steps: int
    rows: dict[str, int]
    ops: list[dict[str, Any]]
    backend: str
    exact: bool
    plan_hash: str
    fp8: dict[str, float]
    int8_forward: dict[str, float]
    memory: list[dict[str, Any]]
    launches: dict[str, int]
    macs: list[Mac]


def step_of(
    config: DecoderConfig,
    backend: Backend,
    *,
    dtype: str,
    batch: int,
    length: int,
    attention: str = "sdpa",
    method: str | None = "full",
    packing: bool = False,
    memory: int | None = None,
    fp8: bool = False,
    int8_forward: bool = False,
    affine: Mapping[str, Affine] | None = None,
) -> list[Program]:
    """The programs of a training step of a model, every parameter and row trained or (LoRA, of rank 16) adapters beside
    all linear layers: micro-batch and update. `method` None: logits alone. Nothing is read or computed."""
    outline, form = outline_of(
        config,
        backend,
        dtype=dtype,
        batch=batch,
        length=length,
        attention=attention,
        method=method,
        packing=packing,
        memory=memory,
        fp8=fp8,
        int8_forward=int8_forward,
        affine=affine,
    )
    if method is None:
        return [outline.session.logits_program(form)]
    micro = outline.micro(form)
    if fp8:
        floats.layers(micro.graph, field="fp8")
    return [micro, outline.update]


def outline_of(
    config: DecoderConfig,
    backend: Backend,
    *,
    dtype: str,
    batch: int,
    length: int,
    attention: str = "sdpa",
    method: str | None = "full",
    packing: bool = False,
    memory: int | None = None,
    fp8: bool = False,
    int8_forward: bool = False,
    affine: Mapping[str, Affine] | None = None,
) -> tuple[Outline, Form]:
    """What `step_of` makes programs of: the run without its arrays, and the form of its micro-batch."""
    if fp8:
        floats.check(backend, method=method, dtype=dtype, field="fp8")
    if int8_forward:
        integers.check(backend, config, method=method, field="int8_forward")
    lora = None
    if method in ("lora", "qlora"):
        lora = Lora(rank=16, alpha=32.0, dropout=0.0, targets=config.linear_layers(), transposed=config.conv1d)
    if affine and method not in ("qlora", None):
        raise ConfigError(
            f"is {method}, of a base in few bits", field="method", remedy="give qlora, or import it first"
        )
    quantized = config.linear_weights() if method == "qlora" and not affine else ()
    session = Session(
        backend,
        config,
        {},
        dtype,
        attention=attention,
        lora=lora,
        memory=memory,
        quantized=quantized,
        affine=affine or {},
        fp8=fp8,
        w8a8=config.linear_weights() if int8_forward else (),
    )
    form = Form(
        batch=batch,
        seq=length,
        positions=batch if packing else 1,
        dtype=dtype,
        kind="packed" if packing else "causal",
        attention=attention,
        rows=0 if backend.exact or method is None else batch * length,
        windowed=not packing and fills_window(config, length),
    )
    names = [name for name in session.specs() if lora is None or ".lora_" in name]
    return Outline(session=session, names=names, optimizer=AdamW(master=True)), form


def decoding_of(
    config: DecoderConfig,
    backend: Backend,
    *,
    dtype: str,
    length: int,
    attention: str = "sdpa",
    int8: bool = False,
    affine: Mapping[str, Affine] | None = None,
) -> Program:
    """The program of one new token over a cache of `length` places, as `generate` runs it."""
    if int8 and affine:
        raise ConfigError("the weights are in few bits already", field="quantize", remedy="leave it out")
    codes = config.eight_bit_weights() if int8 else ()
    session = Session(backend, config, {}, dtype, attention=attention, int8=codes, affine=affine or {})
    form = Form(batch=1, seq=1, dtype=dtype, attention=attention, capacity=length, rows=0 if backend.exact else 1)
    return session.logits_program(form)


def plan(config: FinetuneConfig, *, say: Say = lambda line: None) -> Plan:
    """The plan of the run's largest micro-batch. Reads the model's shapes and the rows; computes single nodes, to time
    them, and what layers in 8 bits lose. `say` is told what the person who waits should know of the data."""
    parts = Finetune(replace(config, lora=replace(config.lora, init="random")), say=say)  # a start of the same shapes
    outline, train = parts.outline, config.train
    available = fits.memory_available(parts)
    form = largest_form(parts, outline.session.dtype)
    program = _program(outline, form)
    needed = planned_bytes(outline, program, forms=parts.forms)
    if train.grad_accum > 1:
        more = _program(outline, form, accumulate=True)
        needed = max(needed, planned_bytes(outline, more, forms=parts.forms))
    enough = None if available is None else needed <= available
    advised = fits.advice(parts, available) if available is not None and not enough else None
    took = step_time(outline, form, accumulate=train.grad_accum, most_bytes=available) if enough is not False else None
    cost: Cost = program.cost
    return Plan(
        parameters=sum(spec.numel for spec in specs_of(parts.files.tensors).values()),
        trained_parameters=sum(program.graph.inputs[name].numel for name in outline.names),
        nodes=len(program.calls),
        flops_per_token=cost.flops // program.graph.inputs["input_ids"].numel,
        planned_bytes=needed,
        memory_available=available,
        fits=enough,
        advice=None if advised is None else str(advised),
        longest_row=None if available is None else fits.longest_row(parts, available),
        step_seconds=None if took is None else took.seconds,
        batch={"rows": form.batch, "tokens": form.seq, "grad_accum": train.grad_accum},
        steps=parts.steps.total,
        rows=parts.tokenized.counts.rows,
        ops=_ops(program, outline.update, took),
        backend=parts.backend.name,
        exact=parts.backend.exact,
        plan_hash=program.plan_hash,
        memory=program.memory(),
        launches=dict(program.launches() + outline.update.launches()),
        macs=macs(needed) if parts.backend.name == "mlx_metal" else [],
        **_errors(parts, program),
    )


def _errors(parts: Finetune, program: Program) -> dict[str, dict[str, float]]:
    """{flag: layers' errors} of each way to take products of 8 bits; for those that the run has, weights are read."""
    asked = {way: getattr(parts.config.train, way.key) for way in EIGHT_BITS}
    session = parts.trainer().session if any(asked.values()) else None
    return {
        way.key: way.of_normal(session, program.graph, field=f"train.{way.key}") if wanted and session else {}
        for way, wanted in asked.items()
    }


def _program(outline: Outline, form: Form, *, accumulate: bool = False) -> Program:
    """What would run; of a run that no recomputation makes fit, the smallest that it could be."""
    try:
        return outline.micro(form, accumulate=accumulate)
    except BackendError as error:
        if error.field != "memory":
            raise
        return outline.smallest(form, accumulate=accumulate)


def _ops(micro: Program, update: Program, took: Estimate | None) -> list[dict[str, Any]]:
    """What runs on what, the micro-batch's first, with each op's seconds of a step where they were timed."""
    counts: dict[tuple[str, str], int] = {}
    for row in (*micro.lowerings(), *update.lowerings()):
        kind = row["op"], row["lowering"]
        counts[kind] = counts.get(kind, 0) + row["count"]
    return [
        {"op": op, "count": count, "lowering": lowering} | ({} if took is None else {"seconds": took.ops[op, lowering]})
        for (op, lowering), count in counts.items()
    ]
