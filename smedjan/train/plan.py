"""What a run will do, before it does it: parameters, FLOPs, memory, and the lowering of each op."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from smedjan.backends.base import Backend
from smedjan.checkpoint.raw import specs_of
from smedjan.graph.op import Cost
from smedjan.graph.program import Program
from smedjan.models.decoder import Form
from smedjan.models.decoder_config import DecoderConfig
from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora
from smedjan.runtime.session import Session, fills_window
from smedjan.train import fp8 as floats
from smedjan.train import int8_forward as integers
from smedjan.train.config import FinetuneConfig
from smedjan.train.finetune import EIGHT_BITS, Finetune
from smedjan.train.largest import largest_form, planned_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`planned_bytes` is the peak of the largest micro-batch plus optimizer state: values counted whole, views too.

    fp8, int8_forward   errors of the layers in 8-bit floats and integers, on normal inputs; empty where there are none
    """

    parameters: int
    trained_parameters: int
    nodes: int
    flops_per_token: int
    planned_bytes: int
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
) -> list[Program]:
    """The programs of a training step of a model, every parameter and row trained or (LoRA, of rank 16) adapters beside
    all linear layers: micro-batch and update. `method` None: logits alone. Nothing is read or computed."""
    if fp8:
        floats.check(backend, method=method, dtype=dtype, field="fp8")
    if int8_forward:
        integers.check(backend, config, method=method, field="int8_forward")
    lora = None
    if method in ("lora", "qlora"):
        lora = Lora(rank=16, alpha=32.0, dropout=0.0, targets=config.linear_layers(), transposed=config.conv1d)
    quantized = config.linear_weights() if method == "qlora" else ()
    session = Session(
        backend,
        config,
        {},
        dtype,
        attention=attention,
        lora=lora,
        memory=memory,
        quantized=quantized,
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
    if method is None:
        return [session.logits_program(form)]
    specs = session.specs()
    names = [name for name in specs if lora is None or ".lora_" in name]
    exact, adamw, shapes = backend.exact, AdamW(master=True), {name: specs[name] for name in names}
    session.reserved = adamw.state_bytes(shapes)
    update = adamw.graph(shapes, exact=exact, buckets=not exact)
    micro = session.micro_program(form, names)
    if fp8:
        floats.layers(micro.graph, field="fp8")
    return [micro, session.finish(update)]


def decoding_of(
    config: DecoderConfig, backend: Backend, *, dtype: str, length: int, attention: str = "sdpa", int8: bool = False
) -> Program:
    """The program of one new token over a cache of `length` places, as `generate` runs it."""
    session = Session(backend, config, {}, dtype, attention=attention, int8=config.eight_bit_weights() if int8 else ())
    form = Form(batch=1, seq=1, dtype=dtype, attention=attention, capacity=length, rows=0 if backend.exact else 1)
    return session.logits_program(form)


def plan(config: FinetuneConfig) -> Plan:
    """The plan of the run's largest micro-batch; reads the model and the rows, and computes nothing but what layers in
    8 bits lose."""
    parts = Finetune(replace(config, lora=replace(config.lora, init="random")))  # a start of the same shapes
    trainer = parts.trainer()
    form = largest_form(parts, trainer.session.dtype)
    program = trainer.session.micro_program(form, trainer.names)
    cost: Cost = program.cost
    tokens = program.graph.inputs["input_ids"].numel
    counts = parts.tokenized.counts
    return Plan(
        parameters=sum(spec.numel for spec in specs_of(parts.files.tensors).values()),
        trained_parameters=sum(program.graph.inputs[name].numel for name in trainer.names),
        nodes=len(program.calls),
        flops_per_token=cost.flops // tokens,
        planned_bytes=planned_bytes(trainer, program),
        steps=parts.steps.total,
        rows={"kept": counts.kept, "truncated": counts.truncated, "dropped": counts.dropped},
        ops=[*program.lowerings(), *trainer.update.lowerings()],
        backend=parts.backend.name,
        exact=parts.backend.exact,
        plan_hash=program.plan_hash,
        memory=program.memory(),
        launches=dict(program.launches() + trainer.update.launches()),
        **{
            way.key: way.of_normal(trainer.session, program.graph, field=f"train.{way.key}")
            if getattr(config.train, way.key)
            else {}
            for way in EIGHT_BITS
        },
    )
