"""`smedjan graph DIR [--plan]`."""

from __future__ import annotations

from collections import Counter
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
    decode: Annotated[
        bool, Parameter(negative=(), show_default=False, help="of one new token over a cache of --length places")
    ] = False,
    quantize: Annotated[
        Literal["int8"] | None, Parameter(help="with --decode: linear layers and head in 8 bits")
    ] = None,
    unfold: Annotated[bool, Parameter(negative=(), show_default=False, help="print every layer")] = False,
    batch_size: Annotated[int, Parameter(help="rows")] = 1,
    length: Annotated[int, Parameter(help="tokens of a row")] = 128,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, Parameter(help="of the computation (default: as stored)")
    ] = None,
    attention: Annotated[Literal["sdpa", "eager"], Parameter(help="of transformers")] = "sdpa",
    method: Annotated[Literal["full", "lora", "qlora"], Parameter(help="what the step trains")] = "full",
    packing: Annotated[
        bool, Parameter(negative=(), show_default=False, help="rows that hold several documents each")
    ] = False,
    fp8: Annotated[
        bool, Parameter(negative=(), show_default=False, help="linear layers in 8-bit floats (full, cuda_triton)")
    ] = False,
    int8_forward: Annotated[
        bool,
        Parameter(negative=(), show_default=False, help="forward products of the frozen base in 8-bit integers (lora)"),
    ] = False,
    memory: Annotated[
        str | None, Parameter(help="of the device, such as 24GB: what does not fit is recomputed or offloaded")
    ] = None,
    common: Common = COMMON,
) -> Outcome:
    """The graph of a model's training step (with --decode, of a new token), as its backend runs it, and its cost.
    Nothing is computed.

    Example: smedjan graph smollm2 --plan --backend torch_reference
    """
    from smedjan.checkpoint.raw import specs_of
    from smedjan.checkpoint.sizes import parse_size
    from smedjan.graph.printer import lines
    from smedjan.hf.load import COMPUTED, open_model
    from smedjan.runtime.select import backend as select_backend
    from smedjan.train.plan import decoding_of, step_of

    for name, value in (("batch-size", batch_size), ("length", length)):
        if value < 1:
            raise ConfigError(f"is {value}", field=name, remedy="give 1 or more")
    files, backend = open_model(model), select_backend(common.backend)
    chosen = dtype or files.dtype
    if chosen not in COMPUTED:
        raise ConfigError(f"{chosen} is not computed in", field="dtype", remedy=f"give --dtype {' or '.join(COMPUTED)}")
    if quantize is not None and not decode:
        raise ConfigError("is for decoding", field="quantize", remedy="give --decode too")
    if decode:
        int8 = quantize is not None
        programs = [
            decoding_of(
                files.config, backend, dtype=chosen, length=length, attention=attention, int8=int8, affine=files.affine
            )
        ]
    else:
        programs = step_of(
            files.config,
            backend,
            dtype=chosen,
            attention=attention,
            batch=batch_size,
            length=length,
            method=None if forward else method,
            packing=packing,
            fp8=fp8,
            int8_forward=int8_forward,
            memory=None if memory is None else parse_size(memory, "memory"),
            affine=files.affine,
        )
    program = programs[0]
    ops = [row for each in programs for row in each.lowerings()]
    launches = dict(sum((each.launches() for each in programs), Counter[str]()))
    memory_rows = [row for each in programs for row in each.memory()]
    fields = {
        "backend": backend.name,
        "device": backend.device,
        "exact": backend.exact,
        "plan_hash": program.plan_hash,
        "parameters": sum(spec.numel for spec in specs_of(files.tensors).values()),
        "nodes": sum(len(each.calls) for each in programs),
        "flops_per_token": sum(each.cost.flops for each in programs) // (1 if decode else batch_size * length),
        "planned_bytes": program.peak_bytes,
        "ops": ops,
        "memory": memory_rows,
        "launches": launches,
    }
    if plan:
        rows_of_text = [(str(row["op"]), str(row["count"]), str(row["lowering"])) for row in ops]
        body = table(("op", "count", "lowering"), rows_of_text)
        kept = [(str(row["what"]), str(row["of"]), str(row["bytes"])) for row in memory_rows]
        if kept:
            body += "\n\n" + table(("not kept", "of", "bytes"), kept)
        if launches:
            body += f"\n\n{sum(launches.values()):,} launches"
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
