"""The launch tables: every width a kernel may meet is covered by a legal tile."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels import common

WIDTHS = [1, 2, 7, 32, 33, 96, 128, 576, 1536, 2048, 2049, 4096, 8192, 16384]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("table", [common.norm_tile, common.norm_bwd_tile])
def test_a_norm_tile_holds_whole_rows(table, width):
    tile = table(width)
    assert width <= tile.cols < 2 * width or tile.cols == 1
    assert tile.rows & (tile.rows - 1) == tile.cols & (tile.cols - 1) == tile.num_warps & (tile.num_warps - 1) == 0
    assert 1 <= tile.num_warps <= 32
    assert tile.rows * tile.cols <= max(2048, tile.cols)
    assert tile.rows * tile.cols // (32 * tile.num_warps) <= 32, "more values than a thread has registers for"


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vocab", [1, 33, 4095, 4096, 49152, 151936])
def test_a_vocabulary_tile_is_runs_of_16_bytes(vocab, itemsize, heads):
    tile = common.vocab_tile(vocab, itemsize, heads=heads)
    assert tile.cols * itemsize == 16
    assert tile.rows & (tile.rows - 1) == tile.num_warps & (tile.num_warps - 1) == 0
    assert tile.rows * tile.cols >= vocab or tile.rows * tile.cols * heads == 16384
    assert tile.rows * tile.cols // (32 * tile.num_warps) <= 16


@pytest.mark.parametrize("head_dim", [2, 14, 64, 66, 96, 128, 256])
def test_a_rope_tile_holds_half_a_head(head_dim):
    tile = common.rope_tile(head_dim)
    assert head_dim // 2 <= tile.cols < head_dim or head_dim == 2
    assert tile.rows * tile.cols <= 1024


@pytest.mark.parametrize(("dim", "rest"), [(64, 192), (32, 48), (2, 254), (128, 128)])
def test_a_rope_tile_has_room_for_the_rest_of_a_head(dim, rest):
    tile = common.rope_tile(dim, rest, norm=True)
    assert tile.rows * common.next_power_of_2(rest) <= 2048
    assert tile.rows <= common.rope_tile(dim, rest).rows <= common.rope_tile(dim).rows


def test_heads_are_grouped_only_where_there_is_work_for_all():
    assert common.rope_heads(9, 1) == 1
    assert common.rope_heads(9, 512) == 4
    assert common.rope_heads(3, 4096) == 3
    assert common.rope_heads(0, 8) == 1


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [(1, 50, torch.float32), (4096, 49152, torch.bfloat16), (10**6, 151936, torch.float32), (64, 10**7, torch.float32)],
    ids=str,
)
def test_chunks_fit_the_buffer_or_are_the_smallest(rows, vocab, dtype, heads, summed):
    """In `LOGITS_BYTES`, or in half of what a weight gradient that is summed over chunks takes."""
    weight = torch.empty(vocab, 512, dtype=dtype, device="meta")
    chunk = common.chunk_rows(rows, weight, heads, summed=summed)
    assert 1 <= chunk <= rows
    room = max(common.LOGITS_BYTES, weight.numel() * 2) if summed else common.LOGITS_BYTES
    assert chunk * heads * common.padded_vocab(vocab) * dtype.itemsize <= room or chunk <= 128
    assert chunk == rows or chunk % 128 == 0


@pytest.mark.parametrize("numel", [0, 1, 8192, 8193, 10**9])
def test_square_sum_programs(numel):
    assert (common.square_sum_programs(numel) == 0) == (numel == 0)
    assert common.square_sum_programs(numel) <= common.NORM_PROGRAMS


@triton.jit
def _tanh_all(x, y, COLS: tl.constexpr):
    col = tl.arange(0, COLS)
    tl.store(y + col, common.tanh(tl.load(x + col)))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_tanh_is_good_to_an_ulp_or_two(device):
    """At every scale, where 1 - 2 / (exp(2x) + 1) would have no digits left of a small x."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(65536, generator=generator) * 10.0 ** torch.linspace(-20, 2, 65536)
    x[:6] = torch.tensor([0.0, 0.625, -0.625, 1e30, float("inf"), -float("inf")])
    y = torch.zeros(65536, device=device)
    _tanh_all[(1,)](x.to(device), y, COLS=65536)
    reference = torch.tanh(x.double())
    relative = (y.cpu().double() - reference).abs() / reference.abs().clamp(min=1e-300)
    assert float(relative.max()) <= 4 * 2.0**-24
    x[0] = float("nan")
    _tanh_all[(1,)](x.to(device), y, COLS=65536)
    assert y.isnan().sum() == 1


@triton.jit
def _narrow_all(x, y, COLS: tl.constexpr):
    col = tl.arange(0, COLS)
    tl.store(y + col, common.narrow(tl.load(x + col), y.dtype.element_ty))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_rounds_like_torch(device, dtype):
    """Every exponent, subnormals, ties, infinities and NaN: Triton's interpreter alone would truncate bfloat16."""
    bits = torch.randint(-(2**31), 2**31 - 1, (65536,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    bits[:4096] &= -65536  # representable in bfloat16
    bits[4096:8192] = (bits[4096:8192] & -65536) | 0x8000  # ties
    x = bits.view(torch.float32).to(device)
    y = torch.zeros(65536, dtype=dtype, device=device)
    _narrow_all[(1,)](x, y, COLS=65536)
    assert torch.equal(y.nan_to_num(7.0), x.to(dtype).nan_to_num(7.0))
    assert torch.equal(y.isnan(), x.isnan())
