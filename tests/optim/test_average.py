"""The mean of weights against torch's AveragedModel: to the bit where exact, within the bound elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from smedjan.graph.rewrite import cse, decompose, distinct_outputs, prune
from smedjan.optim.adamw import AdamW
from smedjan.runtime.select import backend
from tests.tolerances import assert_close

DECAY, STEPS, LR = 0.9, 4, 1e-2


def theirs(dtype: torch.dtype, start: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(start.to(dtype, copy=True))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(model)  # the first one copies
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, foreach=False)
    for grad in grads:
        model.w.grad = grad.to(dtype, copy=True)
        optimizer.step()
        averaged.update_parameters(model)
    return averaged.module.w.detach()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("on", ["torch_reference", "cpu_native", "cuda_triton", "mlx_metal"])
def test_the_mean_is_torchs(on, dtype):
    """Of a bfloat16 weight it is the mean of its float32 master. A step that is skipped leaves it alone."""
    generator = torch.Generator().manual_seed(2)
    start, *grads = (torch.randn(7, 5, generator=generator).to(getattr(torch, dtype)) for _ in range(STEPS + 1))
    where, reference = backend(on), backend("torch_reference")
    optimizer = AdamW(clip=0.0, master=True, ema=DECAY)
    specs = {"w": ((7, 5), dtype)}
    graph = optimizer.graph(specs, exact=where.exact, buckets=not where.exact)
    program = where.program(distinct_outputs(cse(prune(decompose(graph, where.rules.has)))))

    def bound(array: torch.Tensor) -> Any:
        return where.from_raw(reference.to_raw(array))

    live = {name: where.zeros(*spec) for name, spec in optimizer.state(specs).items()}
    live |= {name: bound(start.float()) for name in live if name.partition(".")[0] in ("ema", "master")}
    live["w"] = bound(start)
    for step, grad in enumerate(grads, 1):
        for given in (torch.full_like(grad, float("nan")), grad):
            scalars = optimizer.scalars(specs, lr=LR, step=step, seed=0)
            live = program({**live, "grad.w": bound(given), **scalars})
            live.pop("grad_norm")
    found = reference.from_raw(where.to_raw(live["ema.w"]))
    plain = theirs(torch.float32, start, grads)
    if on == "torch_reference":
        assert torch.equal(found, plain)
    assert_close("ema", found, theirs(torch.float64, start, grads), plain)
