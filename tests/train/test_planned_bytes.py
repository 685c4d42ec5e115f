"""`planned_bytes` is what a run takes: within a tenth of the peak of a process above what it had imported, on runs
whose method, sizes and dtype are drawn."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

DRAWS = 12

RUNS = """
import ctypes, json, os, sys
from pathlib import Path
import numpy, torch
import smedjan, smedjan.train.finetune, smedjan.backends.cpu_native
from smedjan.train.config import FinetuneConfig

PAGE = os.sysconf("SC_PAGE_SIZE")

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def pages_of_files():
    # Addresses of what is mapped from libraries and was touched: fork leaves these pages out of a child
    with open("/proc/self/pagemap", "rb") as pagemap:
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, mode, _, _, inode, *_ = line.split()
            if inode != "0" and mode[0] == "r":
                start, end = (int(address, 16) for address in span.split("-"))
                pagemap.seek(start // PAGE * 8)
                entries = numpy.frombuffer(pagemap.read((end - start) // PAGE * 8), dtype=numpy.uint64)
                yield from (start + PAGE * numpy.flatnonzero(entries >> numpy.uint64(63))).tolist()

imported = list(pages_of_files())
for number, flags in enumerate(json.loads(sys.argv[1])):
    reader, writer = os.pipe()
    if os.fork() == 0:  # each run has what was imported and nothing else
        for address in imported:
            ctypes.c_ubyte.from_address(address).value
        config, seen = FinetuneConfig.from_toml(None, flags), []
        baseline = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        smedjan.finetune(config, on_step=seen.append)
        peak = resident("VmHWM") - baseline
        planned = seen[0]["header"]["memory"]["planned_bytes"]
        os.write(writer, json.dumps({"planned": planned, "peak": peak}).encode())
        os._exit(0)
    os.close(writer)
    print(os.read(reader, 1000).decode(), flush=True)
    os.wait()
"""


@pytest.fixture(scope="module")
def medium(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer with 24 million parameters: large beside what a run takes besides its arrays."""
    directory = tmp_path_factory.mktemp("medium")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tiny / name).read_bytes())
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is reset on Linux alone")
def test_planned_bytes_are_what_a_run_takes(medium: Path, tmp_path: Path) -> None:
    draw = random.Random(20261129)
    runs = []
    for number in range(DRAWS):
        length, method = draw.randrange(64, 257, 16), draw.choice(["full", "lora", "qlora"])
        rows = tmp_path / f"{number}.jsonl"
        rows.write_text(
            "".join(json.dumps({"text": "a" * draw.randint(length // 2, length - 1)}) + "\n" for _ in range(40))
        )
        flags = {
            **{"model": str(medium), "data": str(rows), "out": str(tmp_path / f"{number}"), "backend": "cpu_native"},
            **{"method": method, "dtype": draw.choice(["float32", "bfloat16"]), "train.packing": draw.random() < 0.3},
            **{"train.batch-size": draw.randint(4, 8), "train.max-length": length, "train.steps": 2},
        }
        if method != "full":
            flags["lora.rank"] = draw.choice([4, 16, 64])
        runs.append(flags)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(runs)], capture_output=True, text=True, check=True, env=environment
    )
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(made) == DRAWS
    off = [each["planned"] / each["peak"] - 1 for each in made]
    told = [f"{run['method']} {run['dtype']} {each} {by:+.1%}" for run, each, by in zip(runs, made, off, strict=True)]
    assert all(abs(by) <= 0.1 for by in off), "\n".join(told)
