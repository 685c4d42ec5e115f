"""What the heads write down: results asked for, buffers, calls of a library; and how many rows make a chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smedjan.backends.cuda_triton import loss
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned.immediate import node_of
from smedjan.backends.planned.launch import Launch, Launches
from smedjan.backends.torch_reference.elementwise import DTYPES as DTYPE_OF
from tests.backends.cuda_triton.loss_cases import BF16, F32, Case

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
"""Beyond the vocabulary both heads have -inf; what the kernel makes of their difference it does not use."""


def test_what_is_asked_for_has_the_bits_of_all(rand, device, same, chunked):
    x, weight, labels = rand(2, 3, 33), rand(50, 33), Case(rows=6, vocab=50, dim=33).labels()
    items = torch.tensor(6.0, device=device)
    chunked(4)
    total, dx, dweight = apply("linear_cross_entropy", x, weight, labels, items, grads="xw")
    assert total.shape == ()
    assert dx.shape == x.shape
    for grads in ("", "x", "w"):
        alone = apply("linear_cross_entropy", x, weight, labels, items, grads=grads)
        same(alone[0], total)
        for name, value, both in zip("xw", alone[1:], (dx, dweight), strict=True):
            same(value, both) if name in grads else None
            assert value.numel() == (both.numel() if name in grads else 0)
    same(apply("linear_cross_entropy", x, weight, labels, 6, grads="x")[1], dx)
    _, lse = apply("linear_log_probs", x, weight, labels)
    shaping = {"scaling": 1.0, "divisor": 1.0, "cap": 0.0}
    dy = torch.full((6,), -1.0 / 6.0, device=device)
    both = apply("linear_log_probs_bwd", dy, x, weight, labels, lse, needs=(True, True), **shaping)
    for needs, value in (((True, False), both[0]), ((False, True), both[1])):
        same(apply("linear_log_probs_bwd", dy, x, weight, labels, lse, needs=needs, **shaping), value)


OUTS = {"loss": 1, "dx": 10 * 8, "dweight": 1001 * 8}
LOGITS = 4 * 1008
"""Four rows of 1001 logits, padded."""


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_kl", "linear_log_probs", "linear_log_probs_bwd"])
def test_what_a_head_allocates(rand, allocations, chunked, op, dtype):
    """Its results and a chunk of logits, a loss a row, and where dweight is rounded in the end its float32 sum."""
    x, weight, labels = rand(10, 8, dtype=dtype), rand(1001, 8, dtype=dtype), Case(rows=10, vocab=1001, dim=8).labels()
    chunked(4)
    total = [] if dtype == F32 else [OUTS["dweight"]]
    if op == "linear_cross_entropy":
        apply(op, x, weight, labels, 10, grads="xw")
        expected = [*OUTS.values(), LOGITS, 10, *total]
    elif op == "linear_kl":
        apply(op, x, weight, x, weight, labels, 10, grads="xw")
        expected = [*OUTS.values(), LOGITS, LOGITS, 10, *total]
    elif op == "linear_log_probs":
        apply(op, x, weight, labels)
        expected = [10, 2 * 10, LOGITS]
    else:
        dy, lse = rand(10), rand(10, 2)
        apply(op, dy, x, weight, labels, lse, needs=(True, True), scaling=1.0, divisor=1.0, cap=0.0)
        expected = [OUTS["dx"], OUTS["dweight"], LOGITS, *total]
    assert sorted(allocations.sizes) == sorted(expected)


def launches(device: str, dtype: torch.dtype, grads: str, rows: int = 9, *, read: bool = True) -> list[Launch]:
    """Those of linear_cross_entropy on arrays of `device`; `read`: somebody reads the loss."""
    real = torch.device(device)
    x, weight = torch.ones(rows, 8, dtype=dtype, device=real), torch.ones(50, 8, dtype=dtype, device=real)
    ins = (x, weight, torch.zeros(rows, dtype=torch.int64, device=real), torch.ones((), device=real))
    node = node_of("linear_cross_entropy", ins, {"grads": grads})
    outs = [torch.empty(out.shape, dtype=DTYPE_OF[out.dtype], device=real) for out in node.outputs]

    def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=real)

    def refused(*_: object) -> Tensor:
        raise AssertionError("no host scalar and no stacked weight is needed")

    run = Launches(real, scratch=scratch, host=refused, allocate=refused)
    loss.linear_cross_entropy(run, ins, (outs[0] if read else None, *outs[1:]), **node.attrs)
    return run.calls


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("grads", ["", "x", "w", "xw"])
def test_the_list_is_known_without_memory(dtype, grads, chunked):
    chunked(4)
    written = [[(call.name, call.grid) for call in launches(where, dtype, grads)] for where in ("cpu", "meta")]
    assert written[0] == written[1]
    names = [name for name, _ in written[0]]
    assert names.count("cross_entropy") == 3
    assert names.count("cublas mm") == 3 + 3 * ("x" in grads) + ("w" in grads)
    assert names.count("cublas addmm") == 2 * ("w" in grads)
    assert names.count("rounded") == ("w" in grads and dtype == BF16)
    assert names[-1] == "sum_losses"


def test_an_unread_loss_is_not_made():
    names = [call.name for call in launches("meta", F32, "x", read=False)]
    assert names == ["cublas mm", "cross_entropy", "cublas mm"]


def test_one_chunk_is_its_own_sum():
    """No float32 weight gradient, and no fill: the only product makes it."""
    names = [call.name for call in launches("meta", BF16, "w")]
    assert names == ["cublas mm", "cross_entropy", "cublas mm", "sum_losses"]


class Aten(TorchDispatchMode):
    """The aten calls that were made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_no_library_call_allocates(chunked):
    """In float32; a mixed product, which CPUs lack, is the GPU's own call there."""
    chunked(4)
    seen = Aten()
    for call in launches("cpu", F32, "xw"):
        if not call.grid:
            with seen:
                call()
    assert seen.names == {"aten.mm.out", "aten.addmm.out"}
    mixed = [call for call in launches("meta", BF16, "w") if "out_dtype" in call.constants]
    assert {call.function for call in mixed} == {torch.mm, torch.addmm}


@pytest.mark.parametrize(
    ("rows", "vocab", "dim", "itemsize", "heads", "summed", "expected"),
    [
        (8192, 128256, 4096, 2, 1, False, 1024),
        (8192, 128256, 4096, 2, 1, True, 4096),
        (8192, 128256, 4096, 2, 2, False, 512),
        (4096, 49152, 576, 2, 1, True, 2688),
        (4096, 151936, 1024, 2, 1, True, 1024),
        (100, 49152, 576, 2, 1, False, 100),
        (10**6, 10**7, 64, 4, 2, False, 128),
    ],
)
def test_rows_of_a_chunk(rows, vocab, dim, itemsize, heads, summed, expected):
    dtype = {2: BF16, 4: F32}[itemsize]
    weight = torch.empty(vocab, dim, dtype=dtype, device="meta")
    assert common.chunk_rows(rows, weight, heads, summed=summed) == expected


def test_a_gain_below_zero_is_decomposed(rand, device):
    """The kernels take the largest logit for the largest z."""
    ins = (rand(3, 8), rand(50, 8), torch.zeros(3, dtype=torch.int64, device=device), torch.ones((), device=device))
    for scaling, found in ((1.0, True), (-1.0, False)):
        assert RULES.has(node_of("linear_cross_entropy", ins, {"scaling": scaling})) == found
    attrs = {"teacher_scaling": -1.0}
    assert not RULES.has(node_of("linear_kl", (*ins[:2], *ins), attrs))
