"""`smedjan graph DIR [--plan]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome, table
from smedjan.errors import ConfigError


def graph(
    model: Annotated[str, Parameter(help="model directory, hub id or .gguf file")],
    /,
    *,
    plan: Annotated[
        bool, Parameter(negative=(), show_default=False, help="which lowering runs each op, in place of the nodes")
    ] = False,
    forward: Annotated[bool, Parameter(negative=(), show_default=False, help="without the gradients")] = False,
    unfold: Annotated[bool, Parameter(negative=(), show_default=False, help="print every layer")] = False,
    batch_size: Annotated[int, Parameter(help="rows")] = 1,
    length: Annotated[int, Parameter(help="tokens of a row")] = 128,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, Parameter(help="of the computation (default: as stored)")
    ] = None,
    attention: Annotated[Literal["sdpa", "eager"], Parameter(help="of transformers")] = "sdpa",
    common: Common = COMMON,
) -> Outcome:
    """The graph of a model's training step, as its backend runs it, and what that costs. Nothing is computed.

    Example: smedjan graph smollm2 --plan --backend torch_reference
    """
    from smedjan.checkpoint.raw import specs_of
    from smedjan.graph.printer import lines
    from smedjan.hf.load import COMPUTED, open_model
    from smedjan.models.decoder import Form
    from smedjan.runtime.select import backend as select_backend
    from smedjan.runtime.session import Session

    for name, value in (("batch-size", batch_size), ("length", length)):
        if value < 1:
            raise ConfigError(f"is {value}", field=name, remedy="give 1 or more")
    files, backend = open_model(model), select_backend(common.backend)
    chosen = dtype or files.dtype
    if chosen not in COMPUTED:
        raise ConfigError(f"{chosen} is not computed in", field="dtype", remedy=f"give --dtype {' or '.join(COMPUTED)}")
    session = Session(backend, files.config, {}, chosen, attention=attention)
    form = Form(batch=batch_size, seq=length, dtype=chosen, attention=attention)
    if forward:
        program = session.logits_program(form)
    else:
        rows = 0 if backend.exact else batch_size * length
        program = session.micro_program(Form(**{**vars(form), "rows": rows}), list(files.tensors))
    ops = program.lowerings()
    fields = {
        "backend": backend.name,
        "device": backend.device,
        "exact": backend.exact,
        "plan_hash": program.plan_hash,
        "parameters": sum(spec.numel for spec in specs_of(files.tensors).values()),
        "nodes": len(program.calls),
        "flops_per_token": program.cost.flops // (batch_size * length),
        "planned_bytes": program.peak_bytes,
        "ops": ops,
    }
    if plan:
        rows_of_text = [(str(row["op"]), str(row["count"]), str(row["lowering"])) for row in ops]
        body = table(("op", "count", "lowering"), rows_of_text)
    else:
        body = "\n".join(lines(program.graph, fold=not unfold))
    return Outcome(fields=fields, text=f"{body}\n{summary(fields)}")


def summary(fields: Mapping[str, Any]) -> str:
    """One line on what a plan costs."""
    return (
        f"{fields['backend']}, plan {fields['plan_hash']}: {fields['parameters']:,} parameters, "
        f"{fields['nodes']:,} nodes, {fields['flops_per_token'] / 1e6:,.1f} MFLOP a token, "
        f"{fields['planned_bytes'] / 2**20:,.0f} MiB at most"
    )
