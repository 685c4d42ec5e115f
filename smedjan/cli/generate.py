"""`smedjan generate DIR PROMPT`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome
from smedjan.cli.sampling import KNOBS, Knobs

DEFAULT_TOKENS = 128


def generate(
    model: Annotated[str, Parameter(help="model directory, run directory or hub id")],
    prompt: Annotated[str, Parameter(help="text to go on from, as it stands: no chat template is put around it")],
    /,
    *,
    adapter: Annotated[Path | None, Parameter(help="adapter directory of PEFT's or mlx-lm's")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, Parameter(help="of the computation (default: as stored)")
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None,
        Parameter(help="hold linear layers and head in 8 bits: smaller, faster, off by a little"),
    ] = None,
    knobs: Knobs = KNOBS,
    common: Common = COMMON,
) -> Outcome:
    """Go on from a prompt, by 128 tokens or what fits. The text is printed as it is made.

    Example: smedjan generate smollm2 "The forge is" --max-new-tokens 16
    """
    from smedjan.api import load
    from smedjan.generate import TextStream
    from smedjan.generate import generate as stream

    sampling = knobs.sampling()
    loaded = load(model, backend=common.backend, dtype=dtype, adapter=adapter, quantize=quantize)
    tokenizer, session = loaded.tokenizer, loaded.session
    prompt_ids = tokenizer.encode(prompt)
    stop = {*tokenizer.eos_token_ids, *session.config.eos_token_id}
    room = session.config.max_position_embeddings - len(prompt_ids)
    most = knobs.max_new_tokens or max(1, min(DEFAULT_TOKENS, room))
    began, made, text = time.perf_counter(), [], TextStream(tokenizer.decode, knobs.stop)
    for token in stream(session, prompt_ids, max_new_tokens=most, stop=stop, sampling=sampling):
        made.append(token)
        piece = text.push(token)
        if not common.json:
            print(piece, end="", flush=True)
        if text.stopped:
            break
    rest = text.finish()
    seconds = time.perf_counter() - began
    speed = len(made) / seconds if made else 0.0
    fields = {
        "backend": session.backend.name,
        "device": session.backend.device,
        "exact": session.backend.exact,
        "plan_hash": [program.plan_hash for program in session.programs.values()][-1],
        "token_ids": made,
        "text": text.text,
        "finish_reason": "stop" if text.stopped or (made[-1:] and made[-1] in stop) else "length",
        "prompt_tokens": len(prompt_ids),
        "tokens_per_s": speed,
        "quantization": None if quantize is None else {"format": quantize, "weight_error": session.quantization_error},
    }
    if not common.json:
        print(rest, flush=True)
    if quantize is not None:
        common.note(f"weights in {quantize}, off by {session.quantization_error:.2%} of their size")
    common.note(f"{len(made)} tokens, {speed:.1f} tokens/s on {session.backend.name}")
    return Outcome(fields=fields)
