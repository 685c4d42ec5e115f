"""Time of each Triton kernel on an NVIDIA GPU, beside its roofline and its peers: rows of bench/results' JSON.

`python bench/gpu_kernels.py RESULTS.json`, usually through `bench/gpu.sh`. An op's roofline is the larger of two times:
the bytes that it must move (its graph op's cost: every input and output once) over the bandwidth that a plain copy
reached in the same run, and its FLOPs over the rate of a plain matrix product. Peers are torch's own functions, what
torch.compile makes of them, and Liger Kernel where it imports. Times are medians of triton.testing.do_bench, which
clears the L2 cache between repetitions; launches are written down before they are timed, as in a run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_result import merge
from torch import Tensor
from torch.nn import functional
from triton.testing import do_bench

from smedjan.backends.cuda_triton.apply import apply, prepare
from smedjan.backends.planned.immediate import node_of

ROWS = 8192
"""Tokens of a step."""

Call = Callable[[], object]
Peers = dict[str, Call]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`ins` and `attrs` of one op, and the peers' way to the same results. `causal` halves attention's FLOPs."""

    op: str
    shape: str
    ins: tuple[Any, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    peers: Peers = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result. `roofline` is the fraction of the bound that was reached, 1 being the best there is."""

    op: str
    shape: str
    ms: float
    roofline: float
    bound: str
    peers: dict[str, float]


def bf16(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * scale


def both(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor | None = None) -> Peers:
    """torch's forward, eager and compiled; with `dy`, its backward alone."""
    if dy is None:
        return {"torch": partial(function, *inputs), "torch.compile": partial(torch.compile(function), *inputs)}
    peers: Peers = {}
    for name, made in (("torch", function), ("torch.compile", torch.compile(function))):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        y = made(*leaves)
        peers[name] = partial(torch.autograd.grad, y, leaves, dy, retain_graph=True)
    return peers


def liger(function: str, *inputs: Any) -> Peers:
    """Liger's autograd function's forward, where Liger is installed."""
    if find_spec("liger_kernel") is None:
        return {}
    import liger_kernel.transformers.functional as theirs

    return {"liger": partial(getattr(theirs, function), *inputs)}


def norm_cases(width: int) -> Iterator[Case]:
    x, weight, delta, dy = bf16(ROWS, width), bf16(width), bf16(ROWS, width), bf16(ROWS, width)
    _, rstd = apply("rms_norm", x, weight, eps=1e-5)
    shape = f"{ROWS} x {width}"

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (width,), weight, 1e-5)

    peers = {**both(plain, [x, weight]), **liger("liger_rms_norm", x, weight, 1e-5)}
    yield Case(op="rms_norm", shape=shape, ins=(x, weight), attrs={"eps": 1e-5}, peers=peers)
    attrs = {"needs": (True, True), "eps": 1e-5, "weight_cast": "before", "offset": 0.0}
    yield Case(
        op="rms_norm_bwd", shape=shape, ins=(x, weight, rstd, dy, None), attrs=attrs, peers=both(plain, [x, weight], dy)
    )
    fused = both(lambda x, delta, weight: plain(x + delta, weight), [x, delta, weight])
    yield Case(op="add_rms_norm", shape=shape, ins=(x, delta, weight), attrs={"eps": 1e-5}, peers=fused)


def rope_cases(heads: int, groups: int, dim: int) -> Iterator[Case]:
    tokens = ROWS // 4
    stacked = bf16(4, tokens, heads + groups, dim).transpose(1, 2)
    q, k = stacked[:, :heads], stacked[:, heads:]
    cos, sin = bf16(1, 1, tokens, dim), bf16(1, 1, tokens, dim)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    peers = both(lambda q, k: (turned(q), turned(k)), [q, k])  # type: ignore[arg-type,return-value]
    shape = f"4 x {heads} + {groups} x {tokens} x {dim}"
    yield Case(op="qk_norm_rope", shape=shape, ins=(q, k, None, None, cos, sin), peers=peers)


def glu_cases(width: int) -> Iterator[Case]:
    gate, up, dy = bf16(ROWS, width), bf16(ROWS, width), bf16(ROWS, width)

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    shape = f"{ROWS} x {width}"
    peers = {**both(plain, [gate, up]), **liger("liger_swiglu", gate, up)}
    yield Case(op="glu", shape=shape, ins=(gate, up), attrs={"act": "silu"}, peers=peers)
    attrs = {"needs": (True, True), "act": "silu"}
    yield Case(op="glu_bwd", shape=shape, ins=(gate, up, dy), attrs=attrs, peers=both(plain, [gate, up], dy))


def attention_cases(batch: int, heads: int, groups: int, tokens: int, dim: int) -> Iterator[Case]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (bf16(batch, tokens, count, dim).transpose(1, 2) for count in (heads, groups, groups))
    dy, scale = bf16(batch, tokens, heads, dim).transpose(1, 2), dim**-0.5
    y, lse = apply("flash_attention", q, k, v, None, None, None, None, scale=scale)
    times = heads // groups
    wide = [q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)]
    forward: Peers = {}
    backward: Peers = {}
    for name, kind in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

        def plain(q: Tensor, k: Tensor, v: Tensor, kind: Any = kind) -> Tensor:
            with sdpa_kernel(kind):
                return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        leaves = [tensor.detach().requires_grad_() for tensor in wide]
        try:
            made = plain(*leaves)
        except RuntimeError as problem:  # torch's word for a backend that this build or GPU lacks
            print(f"{name}: {problem}")
            continue
        forward[name] = partial(plain, *wide)
        backward[name] = partial(torch.autograd.grad, made, leaves, dy, retain_graph=True)
    shape = f"{batch} x {heads}/{groups} x {tokens} x {dim}"
    ins = (q, k, v, None, None, None, None)
    yield Case(op="flash_attention", shape=shape, ins=ins, attrs={"scale": scale}, peers=forward)
    attrs = {"scale": scale, "causal": True, "window": 0, "cap": 0.0}
    yield Case(op="flash_attention_bwd", shape=shape, ins=(dy, *ins, y, lse), attrs=attrs, peers=backward)


def loss_cases(width: int, vocab: int) -> Iterator[Case]:
    rows = 4096
    x, weight, labels = bf16(rows, width), bf16(vocab, width, scale=0.02), torch.randint(0, vocab, (rows,)).cuda()
    items = torch.tensor(float(rows), device="cuda")
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]

    def plain() -> object:
        loss = functional.cross_entropy((leaves[0] @ leaves[1].T).float(), labels, reduction="sum") / rows
        return torch.autograd.grad(loss, leaves)

    def products() -> None:
        logits = x @ weight.T
        _ = logits @ weight
        _ = logits.T @ x

    peers: Peers = {"torch": plain, "its three products": products}
    if find_spec("liger_kernel") is not None:
        import liger_kernel.transformers.functional as theirs

        def fused() -> object:
            loss = theirs.liger_fused_linear_cross_entropy(leaves[0], leaves[1], labels)
            return torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, leaves)

        peers["liger"] = fused
    shape = f"{rows} x {width} x {vocab}"
    yield Case(
        op="linear_cross_entropy", shape=shape, ins=(x, weight, labels, items), attrs={"grads": "xw"}, peers=peers
    )


def lora_cases(width: int, outs: tuple[int, ...], rank: int) -> Iterator[Case]:
    """qkv with adapters: the peer is peft's sequence."""
    x = bf16(ROWS, width)
    weights = [bf16(out, width, scale=width**-0.5) for out in outs]
    downs = [torch.randn(rank, width, device="cuda") for _ in outs]
    ups = [torch.randn(out, rank, device="cuda") for out in outs]

    def plain() -> list[Tensor]:
        return [
            (x @ w.T + ((x.float() @ a.T) @ b.T) * 2.0).to(x.dtype) for w, a, b in zip(weights, downs, ups, strict=True)
        ]

    yield Case(
        op="lora_linear_group",
        shape=f"{ROWS} x {width} -> {'+'.join(map(str, outs))}, r {rank}",
        ins=(x, *weights, *downs, *ups),
        attrs={"adapted": (True,) * len(outs), "biased": False, "scaling": 2.0},
        peers={"peft's sequence": plain, "the base's product": lambda: x @ torch.cat(weights).T},
    )


def optimizer_cases(numel: int) -> Iterator[Case]:
    param, grad, exp_avg, exp_avg_sq = torch.randn(4, numel, device="cuda").unbind()
    params = [tensor.clone() for tensor in (param, grad, exp_avg, exp_avg_sq.square())]
    leaf = param.clone().requires_grad_()
    leaf.grad = grad
    fused = torch.optim.AdamW([leaf], lr=1e-3, fused=True)
    attrs = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    yield Case(
        op="adamw_update",
        shape=f"{numel} float32",
        ins=(*params, 1e-3, 7, None),
        attrs=attrs,
        peers={"torch.optim.AdamW(fused=True)": fused.step},
    )
    yield Case(
        op="global_norm",
        shape=f"{numel} float32",
        ins=(grad,),
        peers={"torch": lambda: torch.linalg.vector_norm(grad)},
    )


def cases() -> Iterator[Case]:
    """SmolLM2-135M's and Llama-3-8B's shapes; one case's arrays at a time."""
    for hidden, intermediate, heads, groups, dim, vocab in (
        (576, 1536, 9, 3, 64, 49152),
        (4096, 14336, 32, 8, 128, 128256),
    ):
        yield from norm_cases(hidden)
        yield from rope_cases(heads, groups, dim)
        yield from glu_cases(intermediate)
        yield from attention_cases(2, heads, groups, 4096, dim)
        yield from loss_cases(hidden, vocab)
        yield from lora_cases(hidden, (heads * dim, groups * dim, groups * dim), 16)
    yield from optimizer_cases(2**26)


def median_ms(call: Call) -> float:
    return float(do_bench(call, warmup=20, rep=80, return_mode="median"))


def peaks() -> tuple[float, float]:
    """Bytes/s of a copy of 1 GiB (read and written), and FLOP/s of a bf16 matmul of 8192 on random data."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) * 1e-3)
    a, b = bf16(8192, 8192), bf16(8192, 8192)
    return copy, 2 * 8192**3 / (median_ms(lambda: a @ b) * 1e-3)


def timed(case: Case, copy: float, matmul: float) -> Row:
    cost = node_of(case.op, case.ins, case.attrs)
    work = cost.op.cost(cost)
    calls, _ = prepare(case.op, *case.ins, **case.attrs)

    def ours() -> None:
        for call in calls:
            call()

    ms = median_ms(ours)
    bounds = {"copy": work.bytes / copy, "matmul": work.flops / matmul}
    bound = max(bounds, key=bounds.__getitem__)
    peers = {name: median_ms(call) for name, call in case.peers.items()}
    return Row(op=case.op, shape=case.shape, ms=ms, roofline=bounds[bound] / (ms * 1e-3), bound=bound, peers=peers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON file of this run, which is added to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return 2
    torch.manual_seed(0)
    copy, matmul = peaks()
    print(f"copy {copy / 1e12:.2f} TB/s, bf16 matmul {matmul / 1e12:.0f} TFLOP/s")
    rows: list[Row] = []
    for case in cases():
        row = timed(case, copy, matmul)
        rows.append(row)
        peers = "".join(f"{ms:9.3f} {name}" for name, ms in row.peers.items())
        print(f"{row.op:22}{row.shape:32}{row.ms:9.3f} ms {row.roofline:5.0%} of {row.bound:7}{peers}", flush=True)
        assert math.isfinite(row.ms)
        merge(
            arguments.results,
            {"copy_bytes_per_s": copy, "matmul_flop_per_s": matmul, "kernels": [asdict(row) for row in rows]},
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
