"""What a run will do, before it does it: parameters, FLOPs, memory, and the lowering of each op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smedjan.checkpoint.raw import specs_of
from smedjan.graph.op import Cost
from smedjan.graph.tensor import Spec
from smedjan.models.decoder import Form
from smedjan.runtime.session import ROW_BUCKET
from smedjan.train.config import FinetuneConfig
from smedjan.train.finetune import Finetune


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`planned_bytes` is the peak of the largest micro-batch plus optimizer state: values counted whole, views too."""

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


def plan(config: FinetuneConfig) -> Plan:
    """The plan of the run's largest micro-batch; reads the model and the rows, computes nothing."""
    parts = Finetune(config)
    lengths = sorted((len(example) for example in parts.dataset.examples), reverse=True)
    longest = parts.max_length if config.train.packing else lengths[0]
    seq = min(-(-longest // 16) * 16, parts.max_length)
    trainer = parts.trainer()
    trained = max(example.trained_tokens for example in parts.dataset.examples) * config.train.batch_size
    rows = 0 if parts.backend.exact else min(-(-trained // ROW_BUCKET) * ROW_BUCKET, seq * config.train.batch_size)
    form = Form(
        batch=config.train.batch_size,
        seq=seq,
        dtype=trainer.session.dtype,
        kind="packed" if config.train.packing else "padded",
        attention=config.train.attention,
        rows=rows,
        positions=config.train.batch_size if config.train.packing else 1,
    )
    program = trainer.session.micro_program(form, trainer.names)
    cost: Cost = program.cost
    state = sum(Spec(*kept).nbytes for kept in trainer.optimizer.state(trainer.shapes).values())
    counts = parts.tokenized.counts
    return Plan(
        parameters=sum(spec.numel for spec in specs_of(parts.files.tensors).values()),
        trained_parameters=sum(program.graph.inputs[name].numel for name in trainer.names),
        nodes=len(program.calls),
        flops_per_token=cost.flops // (form.batch * form.seq),
        planned_bytes=program.peak_bytes + state,
        steps=parts.steps.total,
        rows={"kept": counts.kept, "truncated": counts.truncated, "dropped": counts.dropped},
        ops=[*program.lowerings(), *trainer.update.lowerings()],
        backend=parts.backend.name,
        exact=parts.backend.exact,
        plan_hash=program.plan_hash,
    )
