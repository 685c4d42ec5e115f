"""What all kernels share: the cast that ends each of them, and the launch shapes.

A launch shape is which tile, how many warps and how many programs a kernel gets: a pure function of the shape class.

Nothing is tuned at run time (an autotuner's key costs its caller on every launch, and makes the result depend on what
ran before), and no shape depends on the number of multiprocessors: the order of every sum, hence every bit, is the same
on each GPU. The figures follow from the memory system, not from a measurement:

- A thread reads 16 bytes at a time: 8 bf16 or 4 float32 values. Tiles hold 8 to 16 values a thread.
- A row is reduced inside one program. Short rows share a program (`Tile.rows`), or a head-sized norm would start one
  program for 128 values.
- `budgets.json` holds what this costs in registers, for sm_80 to sm_120; nothing here may spill on sm_90.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels of this process run in Triton's interpreter: decided once, at import, as `triton.jit` does."""

MAX_WIDTH = 16384
"""Widest row that one program reduces without spilling; a wider one raises `ShapeError` in the launcher."""

MAX_FUSED_WIDTH = 8192
"""Widest row for which rms_norm's backward also holds its share of the weight gradient in registers: x, g, weight and
dw are 4 values a column, at 16 warps 64 of a thread's 128 registers. Wider rows take a second kernel for dw."""

MAX_PROGRAMS = 256
"""Programs that share a reduction over rows: two for each multiprocessor of an H100, and one [256, D] buffer."""

MAX_WIDE_PROGRAMS = 16
"""The same for rows wider than `MAX_FUSED_WIDTH`, where each program has 64 columns: 16 x 256 programs at 16384."""

NORM_PROGRAMS = 1024
"""Programs (and partial sums) for one gradient's sum of squares."""

LOGITS_BYTES = 256 * 2**20
"""Largest logits buffer that linear_cross_entropy allocates when it may choose the rows of a chunk."""


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 -> dtype, to nearest, ties to even.

    On a device that is `value.to(dtype)`. The interpreter (3.6 to 3.9) cuts bfloat16's lower bits off instead: twice
    the error, always towards zero, and subnormals come out wrong. There the bits are rounded here.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding a NaN's bits could make it infinite or zero.
        bits = tl.where(value == value, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def tanh(x):
    """tanh(x) in float32, to about one ulp: 1 - 2 / (exp(2x) + 1) alone would lose a small x's digits.

    Below 0.625 the polynomial of Cephes' tanhf (Moshier). Triton's own is libdevice's, which its interpreter lacks.
    """
    square = x * x
    curve = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square + 1.33314422036e-1
    near = x + x * square * (curve * square - 3.33332819422e-1)
    # exp of a negative number alone: it cannot overflow.
    decay = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * decay / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A program's tile, `rows` x `cols` values (both powers of two), and its warps."""

    rows: int
    cols: int
    num_warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Launch options. Fusing a multiply and an add is stated, because Triton 3.10 turns its default off."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


def cdiv(count: int, size: int) -> int:
    """Smallest n with n * size >= count."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """Smallest power of two >= max(count, 1)."""
    return 1 << max(count - 1, 0).bit_length()


def _warps(values: int, per_thread: int) -> int:
    """Warps that give each thread `per_thread` of `values`: 1 to 32, a power of two."""
    return min(max(values // (32 * per_thread), 1), 32)


def norm_tile(width: int) -> Tile:
    """rms_norm forward, rows of `width`: whole rows, 2048 values or one row, 16 values a thread."""
    cols = next_power_of_2(width)
    rows = max(2048 // cols, 1)
    return Tile(rows=rows, cols=cols, num_warps=_warps(rows * cols, 16))


def norm_bwd_tile(width: int) -> Tile:
    """rms_norm backward, likewise, but 16 warps at most: of 32, each thread has only 64 registers."""
    tile = norm_tile(width)
    return Tile(rows=tile.rows, cols=tile.cols, num_warps=min(tile.num_warps, 16))


def column_tile() -> Tile:
    """Sums down columns: 32 rows x 64 columns, 128 or 256 contiguous bytes a row, 16 values a thread."""
    return Tile(rows=32, cols=64, num_warps=4)


def row_programs(rows: int, tile: Tile) -> int:
    """Programs that share `rows` for a reduction over rows."""
    return min(cdiv(rows, tile.rows), MAX_PROGRAMS)


def rope_tile(head_dim: int) -> Tile:
    """rope: tokens x half heads; each of a tile's values is two of x, two of cos and two of sin."""
    cols = next_power_of_2(head_dim // 2)
    return Tile(rows=max(1024 // cols, 1), cols=cols, num_warps=4)


def rope_heads(heads: int, tokens: int) -> int:
    """Heads a program turns with one load of cos and sin: 4 when there are tokens enough to fill the GPU, else 1."""
    return min(4, heads) if tokens >= 1024 else 1


def flat_tile() -> Tile:
    """Elementwise kernels (glu, AdamW): 1024 values, 8 a thread."""
    return Tile(rows=1, cols=1024, num_warps=4)


def vocab_tile(vocab: int) -> Tile:
    """cross_entropy: a row in steps of at most 4096 logits, 16 a thread."""
    cols = min(next_power_of_2(vocab), 4096)
    return Tile(rows=1, cols=cols, num_warps=_warps(cols, 16))


def square_sum_tile() -> Tile:
    """Sum of squares: 4096 values a step, 16 a thread."""
    return Tile(rows=1, cols=4096, num_warps=8)


def square_sum_programs(numel: int) -> int:
    """Programs, hence partial sums, for one gradient of `numel` values: at least two steps each, at most 1024."""
    return min(cdiv(numel, 2 * square_sum_tile().cols), NORM_PROGRAMS)


def chunk_rows(rows: int, vocab: int, itemsize: int) -> int:
    """Rows of logits held at once: all if they fit in `LOGITS_BYTES`, else a multiple of 128 (cuBLAS tiles), >= 128."""
    fit = LOGITS_BYTES // (vocab * itemsize)
    return min(rows, max(fit // 128 * 128, 128))
