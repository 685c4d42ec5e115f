"""`smedjan import SRC OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome


def import_model(
    source: Annotated[str, Parameter(help="model directory, hub id (org/name[@revision]) or .gguf file")],
    out: Annotated[Path, Parameter(help="directory to make")],
    /,
    *,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, Parameter(help="of the weights (default: as stored)")
    ] = None,
    ignore_key: Annotated[
        tuple[str, ...],
        Parameter(negative=(), show_default=False, help="key of config.json to let pass; may be given again"),
    ] = (),
    max_shard_size: Annotated[str, Parameter(help="largest file of weights, such as 200MB")] = "5GB",
    common: Common = COMMON,
) -> Outcome:
    """Make a model directory of a Hugging Face model or a GGUF file.

    Example: smedjan import SmolLM2-135M.gguf smollm2
    """
    from smedjan.hf.import_model import import_model as run

    made = run(source, out, dtype=dtype, ignore_keys=ignore_key, max_shard_size=max_shard_size, say=common.note)
    for line in made.notes:
        common.note(line)
    quantized = made.source_quantization
    origin = f", dequantized from {', '.join(sorted(quantized))}" if quantized else ""
    text = f"{out}: {made.model_type}, {made.parameters:,} parameters, {made.dtype}{origin}"
    return Outcome(fields=vars(made), text=text)
