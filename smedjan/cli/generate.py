"""`smedjan generate DIR PROMPT`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome


def generate(
    model: Annotated[str, Parameter(help="model directory, run directory or hub id")],
    prompt: Annotated[str, Parameter(help="text to go on from, as it stands: no chat template is put around it")],
    /,
    *,
    adapter: Annotated[Path | None, Parameter(help="adapter directory in PEFT's layout")] = None,
    max_new_tokens: Annotated[int | None, Parameter(help="most tokens to make (default 128, or what fits)")] = None,
    temperature: Annotated[float, Parameter(help="0: always the likeliest token")] = 0.0,
    top_k: Annotated[int | None, Parameter(help="keep the k likeliest tokens")] = None,
    top_p: Annotated[float | None, Parameter(help="keep the likeliest tokens of this much probability")] = None,
    min_p: Annotated[float | None, Parameter(help="keep tokens at least this share as likely as the first")] = None,
    repetition_penalty: Annotated[float | None, Parameter(help="above 1: discourage tokens seen before")] = None,
    seed: Annotated[int, Parameter(help="of sampling")] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, Parameter(help="of the computation (default: as stored)")
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None,
        Parameter(help="hold linear layers and head in 8 bits: smaller, faster, off by a little"),
    ] = None,
    common: Common = COMMON,
) -> Outcome:
    """Go on from a prompt. The text is printed as it is made.

    Example: smedjan generate smollm2 "The forge is" --max-new-tokens 16
    """
    from smedjan.api import load

    loaded = load(model, backend=common.backend, dtype=dtype, adapter=adapter, quantize=quantize)
    tokenizer, session = loaded.tokenizer, loaded.session
    prompt_ids = tokenizer.encode(prompt)
    stop = sorted({*tokenizer.eos_token_ids, *session.config.eos_token_id})
    if max_new_tokens is None:
        max_new_tokens = max(1, min(128, session.config.max_position_embeddings - len(prompt_ids)))
    began, made, printed = time.perf_counter(), [], ""
    for token in loaded.generate(
        prompt_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    ):
        made.append(token)
        text = tokenizer.decode(made)
        # A character of several tokens decodes to the replacement character until its last one is there
        if not common.json and text.startswith(printed) and not text.endswith("\ufffd"):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    seconds, text = time.perf_counter() - began, tokenizer.decode(made)
    speed = len(made) / seconds if made else 0.0
    rest = text[len(printed) :]
    fields = {
        "backend": session.backend.name,
        "device": session.backend.device,
        "exact": session.backend.exact,
        "plan_hash": [program.plan_hash for program in session.programs.values()][-1],
        "token_ids": made,
        "text": text,
        "finish_reason": "stop" if made and made[-1] in stop else "length",
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
