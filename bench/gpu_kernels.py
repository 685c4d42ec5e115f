"""Time of each Triton kernel on an NVIDIA GPU, beside its roofline and torch's own kernels: one JSON file a run.

`python bench/gpu_kernels.py RESULTS_DIR [--tests passed|failed]`, usually through `bench/gpu.sh`. A kernel here waits
for memory: its roofline is the bytes it must move over the bandwidth that a plain copy reached in the same run. The
fused head is bound by cuBLAS: its roofline is 6 R V D FLOPs over the rate of a plain matmul. Times are medians of
triton.testing.do_bench, which clears the L2 cache between repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton.testing import do_bench

from smedjan.backends.cuda_triton.glu import glu, glu_bwd
from smedjan.backends.cuda_triton.loss import cross_entropy, cross_entropy_bwd, linear_cross_entropy
from smedjan.backends.cuda_triton.norm import rms_norm, rms_norm_bwd
from smedjan.backends.cuda_triton.optimizer import adamw_update, global_norm
from smedjan.backends.cuda_triton.rope import rope

ROWS = 8192
"""Tokens of a step."""

MODELS = (("SmolLM2-135M", 576, 1536, 9, 64, 49152), ("Llama-3.1-8B", 4096, 14336, 32, 128, 128256))
"""hidden_size, intermediate_size, heads, head_dim, vocab_size."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed: ours, torch's way to the same result, and the least work that either must do."""

    op: str
    shape: str
    ours: Callable[[], object]
    peer: str
    theirs: Callable[[], object]
    moved: int = 0
    """Bytes; 0: bound by `flops`."""
    flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result. `roofline` is the fraction of the bound that was reached, 1 being the best there is."""

    op: str
    shape: str
    ms: float
    peer: str
    peer_ms: float
    roofline: float
    roofline_of: str


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _norm_cases(width: int) -> Iterator[Case]:
    x, weight, dy, acc = bf16(ROWS, width), bf16(width), bf16(ROWS, width), bf16(ROWS, width)
    _, rstd = rms_norm(x, weight, eps=1e-5)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = functional.rms_norm(leaves[0], (width,), leaves[1], 1e-5)
    shape = f"{ROWS} x {width}"
    yield Case(
        op="rms_norm",
        shape=shape,
        ours=lambda: rms_norm(x, weight, eps=1e-5),
        peer="F.rms_norm",
        theirs=lambda: functional.rms_norm(x, (width,), weight, 1e-5),
        moved=2 * x.nbytes,
    )
    yield Case(
        op="rms_norm_bwd",
        shape=shape,
        ours=lambda: rms_norm_bwd(x, weight, rstd, dy, acc, needs=(True, True), eps=1e-5),
        peer="autograd of F.rms_norm, then add",
        theirs=lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)[0].add_(acc),
        moved=4 * x.nbytes,
    )


def _rope_case(heads: int, dim: int) -> Case:
    x = bf16(4, ROWS // 4, heads, dim).transpose(1, 2)
    cos, sin = bf16(1, ROWS // 4, dim), bf16(1, ROWS // 4, dim)

    def eager() -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    return Case(
        op="rope",
        shape=f"4 x {heads} x {ROWS // 4} x {dim}",
        ours=lambda: rope(x, cos, sin),
        peer="transformers' sequence, eager",
        theirs=eager,
        moved=2 * x.nbytes,
    )


def _glu_cases(width: int) -> Iterator[Case]:
    gate, up, dy = bf16(ROWS, width), bf16(ROWS, width), bf16(ROWS, width)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    y = functional.silu(leaves[0]) * leaves[1]
    yield Case(
        op="glu",
        shape=f"{ROWS} x {width}",
        ours=lambda: glu(gate, up),
        peer="F.silu, then mul",
        theirs=lambda: functional.silu(gate) * up,
        moved=3 * gate.nbytes,
    )
    yield Case(
        op="glu_bwd",
        shape=f"{ROWS} x {width}",
        ours=lambda: glu_bwd(gate, up, dy, needs=(True, True)),
        peer="autograd",
        theirs=lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
        moved=5 * gate.nbytes,
    )


def _loss_cases(width: int, vocab: int) -> Iterator[Case]:
    rows = 2048
    logits, labels = bf16(rows, vocab), torch.randint(0, vocab, (rows,), device="cuda")
    # dlogits replace the logits: timed over and over they drift towards 0, which costs the same.
    given, (_, lse) = logits.clone(), cross_entropy(logits, labels)
    leaf = logits.clone().requires_grad_()
    total = functional.cross_entropy(leaf.float(), labels, reduction="sum")
    shape = f"{rows} x {vocab}"
    yield Case(
        op="cross_entropy",
        shape=shape,
        ours=lambda: cross_entropy(logits, labels),
        peer="F.cross_entropy of logits.float()",
        theirs=lambda: functional.cross_entropy(logits.float(), labels, reduction="none"),
        moved=logits.nbytes,
    )
    yield Case(
        op="cross_entropy_bwd",
        shape=shape,
        ours=lambda: cross_entropy_bwd(given, labels, lse, 1.0),
        peer="autograd",
        theirs=lambda: torch.autograd.grad(total, leaf, retain_graph=True),
        moved=2 * logits.nbytes,
    )
    x, weight = bf16(rows, width), bf16(vocab, width)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]

    def eager() -> tuple[Tensor, ...]:
        made = functional.cross_entropy((leaves[0] @ leaves[1].T).float(), labels, reduction="sum") / rows
        return torch.autograd.grad(made, leaves)

    yield Case(
        op="linear_cross_entropy",
        shape=f"{rows} x {width} x {vocab}",
        ours=lambda: linear_cross_entropy(x, weight, labels, rows, needs=(True, True)),
        peer="matmul, F.cross_entropy, autograd",
        theirs=eager,
        flops=6 * rows * width * vocab,
    )


def _optimizer_cases(numel: int) -> Iterator[Case]:
    param, grad, exp_avg, exp_avg_sq = torch.randn(4, numel, device="cuda").unbind()
    exp_avg_sq = exp_avg_sq.square()
    leaf = param.clone().requires_grad_()
    leaf.grad = grad
    fused = torch.optim.AdamW([leaf], lr=1e-3, fused=True)
    yield Case(
        op="adamw_update",
        shape=f"{numel} float32",
        ours=lambda: adamw_update(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            lr=1e-3,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            bias_correction1=0.5,
            bias_correction2=0.5,
        ),
        peer="torch.optim.AdamW(fused=True)",
        theirs=fused.step,
        moved=7 * param.nbytes,
    )
    yield Case(
        op="global_norm",
        shape=f"{numel} float32",
        ours=lambda: global_norm(grad),
        peer="torch.linalg.vector_norm",
        theirs=lambda: torch.linalg.vector_norm(grad),
        moved=grad.nbytes,
    )


def cases() -> Iterator[Case]:
    """One model's at a time: the tensors of a case live as long as the generator stays there."""
    for _, hidden, intermediate, heads, dim, vocab in MODELS:
        yield from _norm_cases(hidden)
        yield _rope_case(heads, dim)
        yield from _glu_cases(intermediate)
        yield from _loss_cases(hidden, vocab)
        yield from _optimizer_cases(hidden * intermediate)


def median_ms(call: Callable[[], object]) -> float:
    return float(do_bench(call, warmup=25, rep=150, return_mode="median"))


def peaks() -> tuple[float, float]:
    """Bytes/s of a copy of 1 GiB (read and written), and FLOP/s of a bf16 matmul of 8192 on random data."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) * 1e-3)
    a, b = bf16(8192, 8192), bf16(8192, 8192)
    return copy, 2 * 8192**3 / (median_ms(lambda: a @ b) * 1e-3)


def timed(case: Case, copy: float, matmul: float) -> Row:
    ms, peer_ms = median_ms(case.ours), median_ms(case.theirs)
    bound = case.moved / copy if case.moved else case.flops / matmul
    return Row(
        op=case.op,
        shape=case.shape,
        ms=ms,
        peer=case.peer,
        peer_ms=peer_ms,
        roofline=bound / (ms * 1e-3),
        roofline_of="copy" if case.moved else "matmul",
    )


def commit() -> str:
    """The commit that ran, where git is there to say."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def write(result: dict[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder for <device>-<date>.json")
    parser.add_argument("--tests", choices=("passed", "failed", "not run"), default="not run")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return 2
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    copy, matmul = peaks()
    print(f"{device}: copy {copy / 1e12:.2f} TB/s, bf16 matmul {matmul / 1e12:.0f} TFLOP/s")
    rows: list[Row] = []
    for case in cases():
        row = timed(case, copy, matmul)
        rows.append(row)
        against = f"{row.peer_ms:8.3f} ms {row.peer}"
        print(f"{row.op:22}{row.shape:24}{row.ms:8.3f} ms  {row.roofline:5.0%} of {row.roofline_of:7}{against}")
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = arguments.results / f"{name}-{date.today().isoformat()}.json"
    result = {
        "device": device,
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tests": arguments.tests,
        "copy_bytes_per_s": copy,
        "matmul_flop_per_s": matmul,
        "rows": [asdict(row) for row in rows],
    }
    write(result, path)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
