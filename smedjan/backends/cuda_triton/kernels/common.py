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
from torch import Tensor

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

MAX_ROPE_PROGRAMS = 1024
"""Programs at which heads begin to share one, so that cos and sin are read once for them: eight for each multiprocessor
of an H100. With norms, also the most programs that share the sums of their weights' gradients."""

NORM_PROGRAMS = 1024
"""Programs (and partial sums) for one gradient's sum of squares."""

LOGITS_BYTES = 256 * 2**20
"""Logits that a head holds at once, unless it sums a weight gradient over chunks: see `chunk_rows`."""


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


@triton.jit
def dot(a, b, acc=None):
    """a b (+ acc) in float32. The interpreter multiplies bfloat16's bits as integers: there the operands are widened.

    "ieee" is about float32 operands, which would otherwise be rounded to TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


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


def sums_tile(width: int) -> Tile:
    """The last sums down columns, 16 values a thread: of rows as short as a head's, few columns for each program, or
    two programs would read it all."""
    return column_tile() if width >= 1024 else Tile(rows=128, cols=16, num_warps=4)


def row_programs(rows: int, tile: Tile) -> int:
    """Programs that share `rows` for a reduction over rows."""
    return min(cdiv(rows, tile.rows), MAX_PROGRAMS)


def wide_programs(rows: int) -> int:
    """The same where each program has a tile of columns of them."""
    return min(cdiv(rows, column_tile().rows), MAX_WIDE_PROGRAMS)


def rope_tile(dim: int, rest: int = 0, *, norm: bool = False) -> Tile:
    """rope: tokens x half of the `dim` turned dims, 8 values a thread; each of a tile's values is two of x, two of cos
    and two of sin. A norm holds the `rest` of a head too, many times over: at most twice as many values."""
    cols = next_power_of_2(dim // 2)
    rows = max(1024 // cols, 1)
    if rest:
        rows = min(rows, max((2048 if norm else 4096) // next_power_of_2(rest), 1))
    return Tile(rows=rows, cols=cols, num_warps=4)


def rope_heads(heads: int, tiles: int) -> int:
    """Heads a program turns with one load of cos and sin: as many as leave `MAX_ROPE_PROGRAMS` programs to run."""
    return min(max(heads * tiles // MAX_ROPE_PROGRAMS, 1), max(heads, 1))


def copy_tile(width: int) -> Tile:
    """Rows of `width` that are copied: 2048 values or one row, 16 a thread."""
    cols = next_power_of_2(width)
    rows = max(2048 // cols, 1)
    return Tile(rows=rows, cols=cols, num_warps=_warps(rows * cols, 16))


def flat_tile() -> Tile:
    """Elementwise kernels (glu): 1024 values, 8 a thread."""
    return Tile(rows=1, cols=1024, num_warps=4)


def fp8_tile(width: int) -> Tile:
    """Rows to e4m3: whole rows of up to 8192 values, 2048 at least a program, 16 a thread; wider ones in such steps."""
    cols = min(next_power_of_2(width), 8192)
    rows = max(2048 // cols, 1)
    return Tile(rows=rows, cols=cols, num_warps=_warps(rows * cols, 16))


def adamw_tile() -> Tile:
    """AdamW over a bucket: 4 blocks of 256 values, the unit of 8-bit state; a warp a block, 8 values a thread."""
    return Tile(rows=4, cols=256, num_warps=4)


def padded_vocab(vocab: int) -> int:
    """Columns of a buffer of logits: a multiple of 16, so that its rows begin at multiples of 16 bytes."""
    return cdiv(vocab, 16) * 16


def vocab_tile(width: int, itemsize: int, *, heads: int = 1) -> Tile:
    """A row of logits of each of `heads`: runs (rows of the tile) of 16 bytes, 16 logits a thread in all.

    A long row's program has 32 warps, so that one or two fill a multiprocessor: few rows are under way at once, and
    more of what the first pass read is still in the L2 cache for the second (132 rows of 128k bf16 logits are 34 MB).
    """
    cols, most = 16 // itemsize, 16384 // heads
    rows = min(next_power_of_2(cdiv(width, cols)), most // cols)
    return Tile(rows=rows, cols=cols, num_warps=_warps(rows * cols, 16 // heads))


def sum_tile() -> Tile:
    """A sum by one program: 1024 values a step, 4 a thread."""
    return Tile(rows=1, cols=1024, num_warps=8)


def square_sum_tile() -> Tile:
    """Sum of squares: 4096 values a step, 16 a thread."""
    return Tile(rows=1, cols=4096, num_warps=8)


def square_sum_programs(numel: int) -> int:
    """Programs, hence partial sums, for one gradient of `numel` values: at least two steps each, at most 1024."""
    return min(cdiv(numel, 2 * square_sum_tile().cols), NORM_PROGRAMS)


def chunk_rows(rows: int, weight: Tensor, heads: int, *, summed: bool) -> int:
    """Rows whose logits, of `heads` heads [V, D], are held at once: all if they fit, else a multiple of 128 (cuBLAS
    tiles), >= 128.

    They fit in `LOGITS_BYTES`. Where a weight gradient is `summed` over chunks, half the room of that sum will do too,
    [V, D] in float32: each chunk reads and writes all of it, which takes as long as a product of some 1000 rows.
    """
    vocab, width = weight.shape
    room = max(LOGITS_BYTES, vocab * width * 2) if summed else LOGITS_BYTES
    fit = room // (heads * padded_vocab(vocab) * weight.element_size())
    return min(rows, max(fit // 128 * 128, 128))
