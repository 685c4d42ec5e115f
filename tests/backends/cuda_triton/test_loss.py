"""cross_entropy and the fused head on Triton against float64 torch and torch.autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.loss import cross_entropy, cross_entropy_bwd, linear_cross_entropy
from tests.tolerances import UNIT_ROUNDOFF, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 7), (5, 33), (3, 96), (2, 1536), (3, 5003), (2, 8192)]
"""Rows and vocabulary: 5003 and 8192 take several steps of the online softmax."""


@pytest.fixture
def some_labels(device: str) -> Callable[..., Tensor]:
    """Labels in [0, vocab): the first and the last included, and every third row from `skip` on not trained."""

    def make(rows: int, vocab: int, skip: int | None = None) -> Tensor:
        labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(rows))
        labels[0] = vocab - 1
        labels[rows // 2] = 0
        if skip is not None:
            labels[skip::3] = -100
        return labels.to(device)

    return make


def dlogits(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    leaf = logits.clone().requires_grad_()
    wide = leaf if leaf.dtype == torch.float64 else leaf.float()
    return torch.autograd.grad(torch_cross_entropy(wide, labels, reduction="sum") * scale, leaf)[0]


@pytest.mark.parametrize("skip", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradient_are_within_the_derived_bound(rand, some_labels, shape, dtype, skip):
    logits, labels = rand(*shape, dtype=dtype, scale=3.0), some_labels(*shape, skip=skip)
    trained = labels != -100
    loss, lse = cross_entropy(logits, labels)
    assert loss.dtype == lse.dtype == torch.float32
    lse64 = logits.double().logsumexp(-1) * trained
    assert_close("lse", lse, lse64, logits.float().logsumexp(-1) * trained)
    reference = torch_cross_entropy(logits.double(), labels, reduction="none")
    plain = torch_cross_entropy(logits.float(), labels, reduction="none")
    # loss = lse - logits[label] inherits the rounding of the larger of its terms.
    assert_close("loss", loss, reference, plain, scale=float(logits.double().abs().max() + lse64.abs().max()))
    assert torch.equal(loss[~trained], torch.zeros_like(loss[~trained]))

    given = logits.clone()
    got = cross_entropy_bwd(given, labels, lse, 0.125)
    assert got.data_ptr() == given.data_ptr(), "dlogits replace the logits"
    assert_close("dlogits", got, dlogits(logits.double(), labels, 0.125), dlogits(logits, labels, 0.125))
    assert torch.equal(got[~trained], torch.zeros_like(got[~trained]))


def test_scale_may_be_a_tensor(rand, some_labels, same):
    logits, labels = rand(5, 33), some_labels(5, 33)
    _, lse = cross_entropy(logits, labels)
    scale = torch.full((), 0.125, device=logits.device)
    host = cross_entropy_bwd(logits.clone(), labels, lse, 0.125)
    same(cross_entropy_bwd(logits.clone(), labels, lse, scale), host)


def test_rows_of_a_wider_buffer(rand, some_labels, same):
    wide, labels = rand(5, 64), some_labels(5, 33)
    dense = wide[:, :33].contiguous()
    loss, lse = cross_entropy(wide[:, :33], labels)
    same(loss, cross_entropy(dense, labels)[0])
    beyond = wide[:, 33:].clone()
    cross_entropy_bwd(wide[:, :33], labels, lse, 1.0)
    same(wide[:, :33], cross_entropy_bwd(dense, labels, lse, 1.0))
    assert torch.equal(wide[:, 33:], beyond)


def test_extreme_logits(rand, device):
    """Values whose exp overflows, whole steps of -inf (masked words), and equal logits."""
    vocab = common.vocab_tile(10**6).cols + 10
    logits = torch.full((3, vocab), -float("inf"), device=device)
    logits[0, -2:] = torch.tensor([1e4, 1e4 - 1.0], device=device)
    logits[1, 3] = -1e4
    logits[2] = 50.0
    labels = torch.tensor([vocab - 1, 3, 0], device=device)
    loss, lse = cross_entropy(logits, labels)
    reference = torch_cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(loss.double(), reference, rtol=2.0**-20, atol=1e-3)
    got = cross_entropy_bwd(logits.clone(), labels, lse, 1.0)
    torch.testing.assert_close(got.double(), dlogits(logits.double(), labels, 1.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("label", [33, 40, -1])
def test_a_label_outside_the_vocabulary_shows_as_nan(rand, device, label):
    loss, _ = cross_entropy(rand(2, 33), torch.tensor([3, label], device=device))
    assert loss.isfinite().tolist() == [True, False]
    assert bool(loss[1].isnan())


def test_a_nan_logit_shows_as_nan(rand, some_labels):
    logits = rand(2, 33)
    logits[1, 5] = float("nan")
    loss, _ = cross_entropy(logits, some_labels(2, 33))
    assert loss.isnan().tolist() == [False, True]


def head(
    x: Tensor, weight: Tensor, labels: Tensor, items: float, shape: Callable[[Tensor], Tensor] = lambda logits: logits
) -> list[Tensor]:
    """loss, dx, dweight of transformers' head: logits in x's dtype, the loss in float32."""
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    logits = shape(leaves[0] @ leaves[1].T)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch_cross_entropy(wide, labels, reduction="sum") / items
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


SHAPING = {"gain": (0.3, 0.0), "cap": (1.0, 5.0), "both": (0.7, 30.0), "tight": (2.0, 0.5)}


@pytest.mark.parametrize("chunk", [3, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shaping", SHAPING)
def test_scaled_and_capped_logits(rand, some_labels, shaping, dtype, chunk):
    """Gemma 2's and Cohere's heads: the gradient goes through the cap. The vocabulary takes two steps of a row."""
    (gain, cap), vocab = SHAPING[shaping], 4100
    x, weight, labels = rand(5, 9, dtype=dtype), rand(vocab, 9, dtype=dtype), some_labels(5, vocab, skip=2)

    def shape(logits: Tensor) -> Tensor:
        return torch.tanh(logits * gain / cap) * cap if cap else logits * gain

    options = {"needs": (True, True), "chunk_rows": chunk, "gain": gain, "cap": cap}
    got = linear_cross_entropy(x, weight, labels, 4, **options)
    reference = head(x.double(), weight.double(), labels, 4, shape)
    plain = head(x, weight, labels, 4, shape)
    # The loss is of logits rounded to `dtype`, each by u |z|: it inherits at most twice the largest.
    size = float(shape(x.double() @ weight.double().T).abs().max())
    scales = (max(float(reference[0]), size * UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF[torch.float32]), None, None)
    for name, value, true, ours, scale in zip(("loss", "dx", "dweight"), got, reference, plain, scales, strict=True):
        assert_close(name, value, true, ours, scale=scale)


@pytest.mark.parametrize("chunk", [1, 3, 4, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_head_is_within_the_derived_bound(rand, some_labels, dtype, chunk):
    x, weight, labels = rand(11, 33, dtype=dtype), rand(130, 33, dtype=dtype), some_labels(11, 130, skip=2)
    items = int((labels != -100).sum()) + 3
    got = linear_cross_entropy(x, weight, labels, items, needs=(True, True), chunk_rows=chunk)
    assert [value.dtype for value in got] == [torch.float32, dtype, torch.float32]
    reference, plain = head(x.double(), weight.double(), labels, items), head(x, weight, labels, items)
    for name, value, true, ours in zip(("loss", "dx", "dweight"), got, reference, plain, strict=True):
        assert_close(name, value, true, ours)


def test_fused_head_holds_one_chunk_of_logits(rand, some_labels, allocations):
    x, weight, labels = rand(64, 8), rand(1000, 8), some_labels(64, 1000)
    linear_cross_entropy(x, weight, labels, 64, needs=(True, True), chunk_rows=4)
    assert max(allocations.sizes) == 4 * 1000


def test_fused_head_gives_what_is_asked_for(rand, some_labels, device, same):
    x, weight, labels = rand(2, 3, 33), rand(50, 33), some_labels(6, 50)
    items = torch.tensor(6.0, device=device)
    loss, dx, dweight = linear_cross_entropy(x, weight, labels, items, needs=(True, True), chunk_rows=4)
    assert loss.shape == ()
    assert dx.shape == x.shape
    for needs in ((False, False), (True, False), (False, True)):
        alone = linear_cross_entropy(x, weight, labels, items, needs=needs, chunk_rows=4)
        same(alone[0], loss)
        for need, value, both in zip(needs, alone[1:], (dx, dweight), strict=True):
            if need:
                same(value, both)
            else:
                assert value is None
    same(linear_cross_entropy(x, weight, labels, 6, needs=(True, False), chunk_rows=4)[0], loss)
    same(linear_cross_entropy(x, weight, labels, items[None], needs=(True, False), chunk_rows=4)[1], dx)


@pytest.mark.parametrize("rows", [0, 5])
def test_fused_head_without_a_trained_row(rand, device, rows):
    x, weight = rand(rows, 33), rand(50, 33)
    labels = torch.full((rows,), -100, device=device)
    loss, dx, dweight = linear_cross_entropy(x, weight, labels, 1, needs=(True, True), chunk_rows=2)
    assert float(loss) == 0.0
    assert torch.equal(dx, torch.zeros_like(x))
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert cross_entropy(x, labels)[0].tolist() == [0.0] * rows
