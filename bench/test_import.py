"""GB/s and peak memory of `smedjan import` beside transformers' from_pretrained + save_pretrained, of 2 GB of bfloat16.

Each is a process of its own, timed from its start to its end with everything on the disk: smedjan syncs what it writes,
so transformers' files are synced too. smedjan besides checks every value and hashes what it reads and writes, which
transformers does not. Rounds are interleaved, the disk is idle at the start of each, the source is in the page cache.

python -m pytest -m "" bench/test_import.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROUNDS = 5
SHARD = "500MB"
PEER = """
import json, os, sys, time
began = time.perf_counter()
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaForCausalLM
imported = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model.save_pretrained(sys.argv[2], max_shard_size=sys.argv[3])
saved = time.perf_counter()
for path in Path(sys.argv[2]).iterdir():
    with path.open("rb") as file:
        os.fsync(file.fileno())
synced = time.perf_counter()
print(json.dumps({"import": imported - began, "load and save": saved - imported, "sync": synced - saved}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama of 1,009 million random bfloat16 parameters (that of TinyLlama, two layers less), in five files."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=20,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    directory = tmp_path_factory.mktemp("import")
    model.save_pretrained(directory / "source", max_shard_size=SHARD)
    del model
    yield directory / "source"
    shutil.rmtree(directory)


# A process's peak includes that of the one that it was forked from: this one is small.
LAUNCH = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([seconds, peak, done.stdout]))
"""


def timed(words: list[str], out: Path) -> tuple[float, int, str]:
    """Seconds, peak bytes and output of a process that writes to `out`, which is then removed."""
    os.sync()
    done = subprocess.run([sys.executable, "-c", LAUNCH, *words], stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(out)
    seconds, peak, text = json.loads(done.stdout)
    return seconds, peak, text


def interleaved(source: Path, out: Path) -> list[tuple[tuple[float, int, str], tuple[float, int, str]]]:
    ours = [sys.executable, "-m", "smedjan", "import", str(source), str(out), "--max-shard-size", SHARD, "--json"]
    theirs = [sys.executable, "-c", PEER, str(source), str(out), SHARD]
    for words in (ours, theirs):
        timed(words, out)
    return [(timed(ours, out), timed(theirs, out)) for _ in range(ROUNDS)]


def test_import_beside_transformers(benchmark, source: Path) -> None:
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    rounds = benchmark.pedantic(interleaved, args=(source, source.parent / "out"), rounds=1, iterations=1)
    ours, theirs = zip(*rounds, strict=True)
    for name, runs in (("smedjan", ours), ("transformers", theirs)):
        benchmark.extra_info[f"{name}_GB_per_s"] = [round(size / seconds / 1e9, 3) for seconds, _, _ in runs]
        benchmark.extra_info[f"{name}_peak_MB"] = round(median(peak for _, peak, _ in runs) / 1e6)
    parts = [json.loads(text) for _, _, text in theirs]
    benchmark.extra_info["transformers_seconds"] = {
        name: round(median(part[name] for part in parts), 2) for name in parts[0]
    }
    ratio = median(theirs[0] / ours[0] for ours, theirs in rounds)
    unsynced = median((theirs[0] - json.loads(theirs[2])["sync"]) / ours[0] for ours, theirs in rounds)
    memory = median(ours[1] / theirs[1] for ours, theirs in rounds)
    benchmark.extra_info |= {"GB": round(size / 1e9, 3), "ratio": round(ratio, 2), "memory": round(memory, 3)}
    benchmark.extra_info["ratio_where_only_smedjan_syncs"] = round(unsynced, 2)
    print(benchmark.extra_info)
    assert ratio >= 1.5
    assert memory <= 0.5
