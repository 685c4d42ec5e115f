"""Products with NF4 and int8 weights for few rows, and NF4 widened for many: `mx.quantized_matmul` has neither form.

NF4 (`checkpoint/nf4.py`), n values in memory order, 64 to a block, 16,384 to a nested block; int8, a scale to a row:

    scale[b] = DYNAMIC[absmax[b]] * nested[b / 256] + offset
    w[i]     = NORMAL[code[i]] * scale[i / 64]                         NF4
    w[o, i]  = code[o, i] * scale[o]                                   int8

    y = x w^T + bias        x [rows, I], w [O, I] -> y [rows, O]

The products are for few rows, where reading the weight is all the time. A simdgroup has OUTS rows of w, as MLX's own
`qmv` does; its threads lie side by side along them, EACH values a thread and step, and each value that is decoded meets
ROWS rows of x. They are summed in float32 and rounded once: w is not rounded to x's dtype in between.

Codes of 4 bits are read as 32-bit words, eight at once: an NF4 weight of whole blocks is whole words, and its array is
a parameter's own, which starts where its memory does.

`nf4_dequantize` gives bitsandbytes' bits: product and sum are rounded each, for which contraction is forbidden.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from smedjan.backends.mlx_metal.kernels.common import SIMD, Kernel, ceil_div
from smedjan.ops.quantized import BLOCK, NESTED_BLOCK

MAX_ROWS = 8
"""Rows of x up to which the weight is decoded in the product: two passes over it, of MOST_ROWS each. Past that, the
weight is widened once and multiplied by MLX's own gemm."""

MOST_ROWS = 4
OUTS = 4
SIMDGROUPS = 2
"""As in MLX's `qmv`: 64 threads, and with them 8 rows of w, a threadgroup."""

DEQUANTIZE_THREADS = 256


@cache
def _header() -> str:
    from smedjan.checkpoint import nf4  # with numpy, which this backend else does without

    values = ", ".join(f"{float(value)!r}f" for value in nf4.NORMAL)
    return f"""
static constant constexpr const int SIMD = 32;
static constant constexpr const int OUTS = {OUTS};
static constant constexpr const int EACH = 8;
static constant constexpr const int BLOCK = {BLOCK};
static constant constexpr const int NESTED_BLOCK = {NESTED_BLOCK};
static constant constexpr const float NORMAL[16] = {{{values}}};

inline float scale_of(float value, float nested, float offset) {{
#pragma clang fp contract(off)
  const float product = value * nested;
  return product + offset;
}}
"""


def _dequantize() -> str:
    """Four bytes a thread: eight values of one block. The last byte may be half."""
    return """
  const int begin = thread_position_in_grid.x * (EACH / 2);
  const int bytes = codes_shape[0];
  if (begin < bytes) {
    const int block = begin / (BLOCK / 2);
    const float scale = scale_of(dynamic[absmax[block]], nested[block / NESTED_BLOCK], offset);
    for (int i = 0; i < EACH / 2; i++) {
      const int byte = begin + i;
      if (byte < bytes) {
        const uint both = codes[byte];
        const size_t at = size_t(byte) * 2;
        w[at] = static_cast<T>(NORMAL[both >> 4] * scale);
        if (at + 1 < size_t(values)) {
          w[at + 1] = static_cast<T>(NORMAL[both & 15] * scale);
        }
      }
    }
  }
"""


def _product(decode: str, *, whole: bool, scale: str, biased: bool) -> str:
    """`decode` makes `decoded` [EACH] of row `out` from `start` on; `whole`: EACH divides the width."""
    inside = "" if whole else " && start + i < width"
    return f"""
  const int lane = thread_index_in_simdgroup;
  const int width = x_shape[1], rows = x_shape[0];
  const int first_out = (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup)
      * OUTS;
  const int first_row = threadgroup_position_in_grid.y * ROWS;
  float totals[ROWS][OUTS];
  for (int row = 0; row < ROWS; row++) {{
    for (int n = 0; n < OUTS; n++) {{
      totals[row][n] = 0.0f;
    }}
  }}
  for (int start = lane * EACH; start < width; start += SIMD * EACH) {{
    float values[ROWS][EACH];
    for (int row = 0; row < ROWS; row++) {{
      for (int i = 0; i < EACH; i++) {{
        const bool known = first_row + row < rows{inside};
        values[row][i] = known ? static_cast<float>(x[size_t(first_row + row) * width + start + i]) : 0.0f;
      }}
    }}
    for (int n = 0; n < OUTS; n++) {{
      const int out = first_out + n;
      if (out < outs) {{
        float decoded[EACH];
        {decode}
        for (int row = 0; row < ROWS; row++) {{
          float sum = 0.0f;
          for (int i = 0; i < EACH; i++) {{
            sum += decoded[i] * values[row][i];
          }}
          totals[row][n] += sum{scale};
        }}
      }}
    }}
  }}
  for (int row = 0; row < ROWS; row++) {{
    for (int n = 0; n < OUTS; n++) {{
      const int out = first_out + n;
      float total = metal::simd_sum(totals[row][n]);
      if (lane == 0 && out < outs && first_row + row < rows) {{
        {"" if scale else "total *= scales[out];"}
        {"total += static_cast<float>(bias[out]);" if biased else ""}
        y[size_t(first_row + row) * outs + out] = static_cast<T>(total);
      }}
    }}
  }}
"""


_NF4 = """
        const size_t block = size_t(out) * (width / BLOCK) + start / BLOCK;
        const float scale = scale_of(dynamic[absmax[block]], nested[block / NESTED_BLOCK], offset);
        const uint word = words[block * (BLOCK / EACH) + start % BLOCK / EACH];
        for (int i = 0; i < EACH; i += 2) {
          const uint both = word >> (4 * i);
          decoded[i] = NORMAL[both >> 4 & 15];
          decoded[i + 1] = NORMAL[both & 15];
        }"""

_INT8 = """
        for (int i = 0; i < EACH; i++) {
          decoded[i] = start + i < width ? static_cast<float>(codes[size_t(out) * width + start + i]) : 0.0f;
        }"""


@cache
def _dequantize_kernel() -> Kernel:
    return Kernel(
        name="smedjan_nf4_dequantize",
        inputs=("codes", "absmax", "nested", "offset", "dynamic", "values"),
        outputs=("w",),
        source=_dequantize(),
        header=_header(),
    )


@cache
def _nf4_kernel(*, biased: bool) -> Kernel:
    bias = ("bias",) if biased else ()
    return Kernel(
        name=f"smedjan_nf4_linear{'_bias' if biased else ''}",
        inputs=("x", "words", "absmax", "nested", "offset", "dynamic", *bias, "outs"),
        outputs=("y",),
        source=_product(_NF4, whole=True, scale=" * scale", biased=biased),
        header=_header(),
    )


@cache
def _int8_kernel(*, biased: bool) -> Kernel:
    bias = ("bias",) if biased else ()
    return Kernel(
        name=f"smedjan_int8_linear{'_bias' if biased else ''}",
        inputs=("x", "codes", "scales", *bias, "outs"),
        outputs=("y",),
        source=_product(_INT8, whole=False, scale="", biased=biased),
        header=_header(),
    )


def nf4_dequantize(
    codes: mx.array,
    absmax: mx.array,
    nested: mx.array,
    offset: mx.array,
    dynamic: mx.array,
    *,
    shape: tuple[int, int],
    dtype: mx.Dtype,
) -> mx.array:
    """codes uint8 [ceil(n / 2)], absmax uint8 [n / 64], nested [n / 16384], offset [] -> w [O, I] of n values"""
    count = shape[0] * shape[1]
    threads = ceil_div(codes.size, 4)
    (made,) = _dequantize_kernel()(
        *(codes, absmax, nested, offset, dynamic, mx.array(count, dtype=mx.int32)),
        groups=(ceil_div(threads, DEQUANTIZE_THREADS), 1, 1),
        threads=DEQUANTIZE_THREADS,
        shapes=[shape],
        dtypes=[dtype],
        T=dtype,
    )
    return made


def _multiplied(kernel: Kernel, x: mx.array, parts: tuple[mx.array, ...], bias: mx.array | None, outs: int) -> mx.array:
    flat = x.reshape(-1, x.shape[-1])
    rows = min(MOST_ROWS, 1 << (flat.shape[0] - 1).bit_length())
    (made,) = kernel(
        flat,
        *parts,
        *(() if bias is None else (bias,)),
        mx.array(outs, dtype=mx.int32),
        groups=(ceil_div(outs, OUTS * SIMDGROUPS), ceil_div(flat.shape[0], rows), 1),
        threads=SIMDGROUPS * SIMD,
        shapes=[(flat.shape[0], outs)],
        dtypes=[x.dtype],
        T=x.dtype,
        ROWS=rows,
    )
    return made.reshape(*x.shape[:-1], outs)


def nf4_linear(
    x: mx.array,
    codes: mx.array,
    absmax: mx.array,
    nested: mx.array,
    offset: mx.array,
    dynamic: mx.array,
    bias: mx.array | None,
    *,
    outs: int,
) -> mx.array:
    """x [..., I], where I is whole blocks, and bias [O] -> y [..., O]"""
    parts = (codes.view(mx.uint32), absmax, nested, offset, dynamic)
    return _multiplied(_nf4_kernel(biased=bias is not None), x, parts, bias, outs)


def int8_linear(x: mx.array, codes: mx.array, scales: mx.array, bias: mx.array | None) -> mx.array:
    """x [..., I], codes int8 [O, I], scales float32 [O], bias [O] -> y [..., O]"""
    return _multiplied(_int8_kernel(biased=bias is not None), x, (codes, scales), bias, codes.shape[0])
