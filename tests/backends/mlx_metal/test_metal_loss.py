"""Cross-entropy's kernel from its own source: against float64 and its twin, and the limits of M1 to M4."""

from __future__ import annotations

import mlx.core as mx
import pytest
import torch
from metal_checks import DTYPES, FLOAT32, held, normal, without_barrier
from metal_emulator import Emulator, MetalError, Recorder, check_limits, source_of
from mlx_pair import MLX, from_torch

from smedjan.backends.mlx_metal import loss
from smedjan.backends.mlx_metal.kernels import common
from smedjan.backends.mlx_metal.kernels import loss as loss_kernels

SHAPINGS = {
    "plain": {"factor": 1.0, "cap": 0.0, "z_loss": 0.0, "smoothing": 0.0},
    "all": {"factor": 0.7, "cap": 3.0, "z_loss": 0.01, "smoothing": 0.1},
}


def cross_entropy_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    items: float,
    *,
    factor: float,
    cap: float,
    z_loss: float,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient of their sum / items, in float64 by autograd."""
    logits = logits.double().requires_grad_()
    z = logits * factor
    z = cap * torch.tanh(z / cap) if cap else z
    lse = torch.logsumexp(z, dim=-1)
    target = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    losses = lse - (1 - smoothing) * target - smoothing * z.mean(dim=-1) + z_loss * lse**2
    losses = torch.where(labels != -100, losses, 0.0)
    (gradient,) = torch.autograd.grad(losses.sum() / items, logits)
    return losses.detach(), gradient


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [
        (1, 1, FLOAT32),
        *((*shape, dtype) for shape in ((5, 7), (7, 33), (5, 130), (1, 1000), (3, 3001)) for dtype in DTYPES),
    ],
)
def test_cross_entropy(rows, vocab, dtype, shaping, metal):
    """Vocabularies of no multiple, less than a simdgroup and more than a threadgroup's first step; rows left out."""
    logits = normal(rows, vocab, dtype=dtype, scale=4.0, seed=vocab)
    labels = torch.arange(rows) * 5 % vocab
    labels[1::2] = -100
    items, attrs = 2.5, SHAPINGS[shaping]
    given = [from_torch(MLX, each) for each in (logits, labels.int(), torch.tensor(items))]
    losses, dlogits = loss_kernels.cross_entropy(*given, gradient=True, **attrs)
    alone, none = loss_kernels.cross_entropy(*given, gradient=False, **attrs)
    twin_losses, twin_dlogits = loss._losses(*given, gradient=True, **attrs)
    expected, gradient = cross_entropy_of(logits, labels, items, **attrs)
    # lse less z[label], and p less one: where they cancel, the error is that of what cancels.
    held("losses", losses, twin_losses, expected, float(logits.abs().max()) + float(expected.max()))
    held("dlogits", dlogits, twin_dlogits, gradient, attrs["factor"] / items)
    assert none is None
    assert mx.array_equal(alone, losses)
    assert not dlogits[1::2].any()


def test_a_row_of_far_logits_is_summed_without_overflow(metal):
    """Peaks beyond float32's exponent, of either sign, in one row and in one thread's run."""
    logits = torch.full((3, 70), -3e4)
    logits[0, 1::3], logits[1, 69], logits[2] = 3e4, 2e4, -2e4
    given = [from_torch(MLX, each) for each in (logits, torch.tensor([0, 69, 3]).int(), torch.tensor(1.0))]
    losses, dlogits = loss_kernels.cross_entropy(*given, gradient=True, **SHAPINGS["plain"])
    expected, gradient = cross_entropy_of(logits, torch.tensor([0, 69, 3]), 1.0, **SHAPINGS["plain"])
    held("losses", losses, losses, expected, 6e4)
    held("dlogits", dlogits, dlogits, gradient)


def test_a_label_outside_the_vocabulary_makes_its_loss_nan_and_reads_nothing(metal):
    logits, labels = mx.zeros((3, 40)), mx.array([40, -1, 39], dtype=mx.int32)
    losses, _ = loss_kernels.cross_entropy(logits, labels, mx.array(1.0), gradient=True, **SHAPINGS["plain"])
    assert mx.isnan(losses).tolist() == [True, True, False]


def test_two_runs_are_equal_to_the_bit(monkeypatch):
    """Whatever order the threads come in. The functions' errors follow the arguments here, and are drawn once."""
    made = []
    logits, labels = mx.random.normal((4, 600)), mx.array([1, 2, -100, 599], dtype=mx.int32)
    for order in (0, 1):
        emulator = Emulator(seed=7, order=order)
        monkeypatch.setattr(common, "DEVICE", emulator)
        made += loss_kernels.cross_entropy(logits, labels, mx.array(3.0), gradient=True, **SHAPINGS["all"])
    assert mx.array_equal(made[0], made[2])
    assert mx.array_equal(made[1], made[3])


def test_cross_entropy_needs_its_barrier(metal, monkeypatch):
    monkeypatch.setattr(loss_kernels, "LOSS", without_barrier(loss_kernels.LOSS, 1))
    logits, labels = mx.zeros((3, 400)), mx.zeros(3, dtype=mx.int32)
    with pytest.raises(MetalError, match=r"race|before it is written"):
        loss_kernels.cross_entropy(logits, labels, mx.array(1.0), gradient=False, **SHAPINGS["plain"])


HEADS = {
    "SmolLM2-135M": (576, 49152, 0.0),
    "Qwen2.5-0.5B": (896, 151936, 0.0),
    "Qwen3-4B": (2560, 151936, 0.0),
    "Llama-3.1-8B": (4096, 128256, 0.0),
    "Mistral-7B-v0.3": (4096, 32768, 0.0),
    "Gemma-2-2b": (2304, 256000, 30.0),
    "Gemma-3-4b": (2560, 262144, 0.0),
}
"""hidden_size, vocab_size and final_logit_softcapping of models that people train on a Mac."""


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("model", HEADS)
def test_heads_of_real_models_keep_the_limits(model, dtype, monkeypatch):
    """As the rule launches them, at their sizes."""
    recorder = Recorder()
    monkeypatch.setattr(common, "DEVICE", recorder)
    width, vocab, cap = HEADS[model]
    x, weight, labels = mx.zeros((2, 1024, width), dtype), mx.zeros((vocab, width), dtype), mx.zeros((2048,), mx.int64)
    for grads in ("xw", ""):
        loss.metal_linear_cross_entropy(
            *(x, weight, labels, mx.array(1.0)),
            **{"grads": grads, "scaling": 1.0, "divisor": 1.0, "cap": cap, "z_loss": 0.0, "smoothing": 0.0},
        )
    assert {kernel.name for kernel, _ in recorder.launched} == {
        loss_kernels.LOSS.name,
        loss_kernels.LOSS_AND_GRADIENT.name,
    }
    for kernel, launch in recorder.launched:
        check_limits(source_of(kernel, launch), launch)
        assert launch.threads == 512
