"""The heads on Triton and cuBLAS against float64, over generated shapes; mistakes that the bound finds; extremes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

from smedjan.backends.cuda_triton import loss
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import loss as kernels
from smedjan.backends.cuda_triton.loss import Shaping
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned.immediate import immediate
from tests.backends.cpu_native.fused_cases import HEADS
from tests.backends.cuda_triton.conftest import DEVICE
from tests.backends.cuda_triton.loss_cases import (
    BF16,
    CROSS_ENTROPY,
    DTYPES,
    F32,
    KL,
    LOG_PROBS,
    STEP,
    Case,
    check_cross_entropy,
    check_kl,
    check_log_probs,
)
from tests.backends.cuda_triton.mutate import mutated
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
"""Beyond the vocabulary both heads have -inf; what the kernel makes of their difference it does not use."""


@pytest.mark.parametrize("case", CROSS_ENTROPY, ids=str)
def test_cross_entropy(case, chunked):
    chunked(case.chunk)
    check_cross_entropy(case)


@pytest.mark.parametrize("case", KL, ids=str)
def test_kl(case, chunked):
    chunked(case.chunk)
    check_kl(case)


@pytest.mark.parametrize("case", LOG_PROBS, ids=str)
def test_log_probs(case, chunked):
    chunked(case.chunk)
    check_log_probs(case)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.skipif(DEVICE != "cpu", reason="the cases' arrays are on the CPU")
def test_a_head_is_its_decomposition(name, dtype):
    op, case = HEADS[name]
    case.check(RULES, op, dtype)


LARGE = Case(rows=2, vocab=40, dim=4, size=400.0)
MANY = Case(rows=3, vocab=STEP + 400, dim=9)
SMALL = Case(rows=5, vocab=33, dim=8, skip=2)
entropy, kl, probs = check_cross_entropy, check_kl, check_log_probs
MUTATIONS = {
    "no maximum": ("tl.maximum(peak, tl.max(score, axis=1))", "tl.maximum(peak * 0.0, 0.0)", entropy, LARGE),
    "sum not rescaled": ("total * tl.exp2((peak - higher) * rate)", "total", entropy, MANY),
    "runs joined as they are": ("total * tl.exp2((peak - highest) * rate)", "total", entropy, SMALL),
    "one-hot left out": ("gradient - aim, gradient", "gradient, gradient", entropy, SMALL),
    "one-hot not smoothed": ("aim = (1.0 - smoothing) * scale", "pass", entropy, replace(SMALL, smoothing=0.1)),
    "no share of the others": ("smoothing / vocab * scale", "0.0", entropy, replace(SMALL, smoothing=0.1)),
    "mean of the padded row": ("plain / vocab", "plain / width", entropy, replace(SMALL, smoothing=0.4)),
    "loss not smoothed": (
        "below = (1.0 - smoothing) * below +",
        "below = below +",
        entropy,
        replace(SMALL, smoothing=0.4),
    ),
    "cap's slope left out": ("gradient * (1.0 - score * score)", "gradient", entropy, replace(SMALL, cap=1.0)),
    "gain's slope left out": ("scale = gain / ", "scale = 1.0 / ", entropy, replace(SMALL, gain=2.0)),
    "z-loss without gradient": ("2.0 * z_loss * lse)", "0.0)", entropy, replace(SMALL, z_loss=0.05)),
    "z-loss left out": ("+ z_loss * lse * lse", "", entropy, replace(SMALL, z_loss=0.05)),
    "ignored rows counted": ("if label != IGNORE:", "if label != 1000:", kl, SMALL),
    "ignored rows keep their logits": ("_clear(at, width, RUNS, RUN)", "pass", entropy, SMALL),
    "first pass skips the last step": (
        "for start in range(0, width, RUNS * RUN):\n        score",
        "for start in range(0, width - RUNS * RUN, RUNS * RUN):\n        score",
        entropy,
        MANY,
    ),
    "second pass skips the first step": (
        "for back in range(0, width, RUNS * RUN):",
        "for back in range(0, width - RUNS * RUN, RUNS * RUN):",
        entropy,
        MANY,
    ),
    "padding counted": ("col < vocab, _score", "col < width, _score", probs, SMALL),
    "loss without T^2": ("offset - mean) * factor", "offset - mean)", kl, replace(SMALL, temperature=2.0)),
    "gradient without T^2": ("gain * factor / ", "gain / ", kl, replace(SMALL, temperature=2.0)),
    "no difference of lse": ("offset - mean)", "-mean)", kl, SMALL),
    "teacher's softmax left out": ("* teacher_share", "* 0.0", kl, SMALL),
    "reverse without its mean": ("0.0) - mean", "0.0)", kl, replace(SMALL, direction="reverse")),
    "cross sum not rescaled": ("cross * tl.exp(teacher_drop)", "cross", kl, MANY),
    "cross sum not rescaled, reverse": (
        "cross = (cross + total * (drop - teacher_drop)) * tl.exp(drop)",
        "cross = (cross + total * (drop - teacher_drop))",
        kl,
        replace(MANY, direction="reverse"),
    ),
    "cross sum not moved": ("cross += teacher_total * (drop - teacher_drop)", "pass", kl, MANY),
    "cross sum not moved, reverse": (
        "cross = (cross + total * (drop - teacher_drop))",
        "cross = cross",
        kl,
        replace(MANY, direction="reverse"),
    ),
    "lse left out": (" - rest)", ")", probs, SMALL),
    "largest logit left out": ("score * unit - top", "score * unit", probs, SMALL),
    "cotangent left out": ("tl.load(dy + row) * gain", "gain", probs, SMALL),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_fails(name, monkeypatch, tmp_path):
    """Each of these mistakes in a kernel's source breaks the bound of a case that the source itself keeps."""
    old, new, check, case = MUTATIONS[name]
    check(case)
    monkeypatch.setattr(loss, "kernels", mutated(kernels, {old: new}, tmp_path))
    with pytest.raises(AssertionError, match=r"error .* > bound"):
        check(case)


def padded(logits: Tensor) -> Tensor:
    """The same logits in rows as a head's buffer has them."""
    rows, vocab = logits.shape
    wide = torch.full((rows, common.padded_vocab(vocab)), float("nan"), dtype=logits.dtype, device=logits.device)
    wide[:, :vocab] = logits
    return wide[:, :vocab]


def of_logits(logits: Tensor, labels: Tensor, scale: float = 1.0, *, over: bool = False) -> tuple[Tensor, Tensor]:
    """cross_entropy's losses and dlogits of logits as they are: no product makes -inf. `over` them, or a copy."""
    given = logits if over else padded(logits)
    losses = torch.full((logits.shape[0],), float("nan"), device=logits.device)
    items = torch.full((), 1.0 / scale, device=logits.device)
    run = immediate(logits.device)
    loss.cross_entropy(run, given, labels, items, losses, Shaping(gain=1.0, cap=0.0), gradient=True)
    for call in run.calls:
        call()
    return losses, given


def dlogits(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    leaf = logits.clone().requires_grad_()
    wide = leaf if leaf.dtype == torch.float64 else leaf.float()
    return torch.autograd.grad(torch_cross_entropy(wide, labels, reduction="sum") * scale, leaf)[0]


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (5, 33), (3, 96), (2, 1536), (3, 5003), (2, STEP + 8)], ids=str)
def test_given_logits(rand, shape, dtype, skip):
    logits = rand(*shape, dtype=dtype, scale=3.0)
    labels = Case(rows=shape[0], vocab=shape[1], dim=1, skip=skip).labels()
    trained = labels != -100
    losses, got = of_logits(logits, labels, 0.125)
    reference = torch_cross_entropy(logits.double(), labels, reduction="none")
    plain = torch_cross_entropy(logits.float(), labels, reduction="none")
    # loss = lse - logits[label] inherits the rounding of the larger of its terms.
    size = float(logits.double().abs().max() + logits.double().logsumexp(-1).abs().max())
    assert_close("loss", losses, reference, plain, scale=size)
    assert torch.equal(losses[~trained], torch.zeros_like(losses[~trained]))
    assert_close("dlogits", got, dlogits(logits.double(), labels, 0.125), dlogits(logits, labels, 0.125))
    assert torch.equal(got[~trained], torch.zeros_like(got[~trained]))


def test_rows_of_a_wider_buffer(rand, same):
    """A row's padding is the head's own; what lies beyond is not."""
    wide, labels = rand(5, 64), Case(rows=5, vocab=33, dim=1).labels()
    losses, got = of_logits(wide[:, :33], labels)
    beyond = wide[:, 48:].clone()
    again, over = of_logits(wide[:, :33], labels, over=True)
    same(again, losses)
    same(over, got)
    assert torch.equal(wide[:, 48:], beyond)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_extreme_logits(device):
    """Values whose exp overflows, whole steps of -inf (masked words), and equal logits."""
    vocab = STEP + 10
    logits = torch.full((3, vocab), -float("inf"), device=device)
    logits[0, -2:] = torch.tensor([1e4, 1e4 - 1.0], device=device)
    logits[1, 3] = -1e4
    logits[2] = 50.0
    labels = torch.tensor([vocab - 1, 3, 0], device=device)
    losses, got = of_logits(logits, labels)
    reference = torch_cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(losses.double(), reference, rtol=2.0**-20, atol=0)
    torch.testing.assert_close(got.double(), dlogits(logits.double(), labels, 1.0), rtol=2.0**-20, atol=0)


@pytest.mark.parametrize("label", [33, 40, -1])
def test_a_label_outside_the_vocabulary_shows_as_nan(rand, device, label):
    x, weight, labels = rand(2, 8), rand(33, 8), torch.tensor([3, label], device=device)
    losses, _ = of_logits(rand(2, 33), labels)
    assert losses.isfinite().tolist() == [True, False]
    assert bool(losses[1].isnan())
    assert bool(apply("linear_cross_entropy", x, weight, labels, 2.0)[0].isnan())
    assert apply("linear_log_probs", x, weight, labels)[0].isnan().tolist() == [False, True]


def test_a_nan_logit_shows_as_nan(rand, device):
    logits = rand(2, 33)
    logits[1, 5] = float("nan")
    losses, _ = of_logits(logits, torch.tensor([3, 4], device=device))
    assert losses.isnan().tolist() == [False, True]


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_without_a_trained_row(rand, device, chunked, rows, dtype):
    x, weight, labels = rand(rows, 33, dtype=dtype), rand(50, 33, dtype=dtype), torch.full((rows,), -100, device=device)
    chunked(2)
    losses = apply("linear_cross_entropy", x, weight, labels, 1, grads="xw", z_loss=0.1)
    divergence = apply("linear_kl", x, weight, x, weight, labels, 1, grads="xw")
    log_probs, lse = apply("linear_log_probs", x, weight, labels)
    assert log_probs.tolist() == [0.0] * rows
    assert lse.tolist() == [[0.0, 0.0]] * rows
    dy = torch.ones(rows, device=device)
    shaping = {"scaling": 1.0, "divisor": 1.0, "cap": 0.0}
    found = apply("linear_log_probs_bwd", dy, x, weight, labels, lse, needs=(True, True), **shaping)
    for total, dx, dweight in (losses, divergence, (torch.zeros((), device=device), *found)):
        assert float(total) == 0.0
        assert torch.equal(dx, torch.zeros_like(x))
        assert torch.equal(dweight, torch.zeros_like(weight))


def test_a_teacher_of_another_dtype(rand, same):
    """Each head's logits are of its own dtype."""
    (x, t), (weight, u) = (rand(4, 8), rand(4, 5)), (rand(200, 8), rand(200, 5))
    labels = Case(rows=4, vocab=200, dim=8, skip=3).labels()
    narrow = (t.bfloat16(), u.bfloat16())
    mixed = apply("linear_kl", x, weight, *narrow, labels, 4, grads="xw")
    # Of a float32 teacher with the same logits: identity makes them its states.
    logits = (narrow[0] @ narrow[1].T).float()
    wide = apply("linear_kl", x, weight, logits, torch.eye(200, device=x.device), labels, 4, grads="xw")
    for value, other in zip(mixed, wide, strict=True):
        same(value, other)


def test_equal_heads_do_not_diverge(rand, device):
    x, weight, labels = rand(4, 8, scale=3.0), rand(200, 8), Case(rows=4, vocab=200, dim=8).labels()
    for direction in ("forward", "reverse"):
        total, dx = apply("linear_kl", x, weight, x, weight, labels, 4, grads="x", direction=direction)[:2]
        assert abs(float(total)) < 1e-6
        assert float(dx.abs().max()) < 1e-6
