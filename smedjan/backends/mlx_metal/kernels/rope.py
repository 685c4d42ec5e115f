"""The rotation of heads, alone or behind their rms_norm, and its gradients: a head of a token to a simdgroup.

    n = x * rstd, rstd = (mean(x^2) + eps)^(-1/2);  v = n * (offset + weight)      where there is a norm; else v = x
    y1 = v1 cos - v2 sin,  y2 = v2 cos + v1 sin                                   over the pairs of the first 2 HALF

    g1 = dy1 cos + dy2 sin,  g2 = dy2 cos - dy1 sin                               the rotation undone
    dx = rstd (h - n mean(h n)),  h = g * (offset + weight);   dw = sum over heads and tokens of g n

The dims past 2 HALF are not turned. Pairs are (i, i + HALF), or (2 i, 2 i + 1) where INTERLEAVED. The two places of a
frequency are equal in the tables, of which the first is read. Everything in float32, rounded once.

x [B, H, T, D] may be a view of a [B, T, H D] projection: heads are read where they lie, by the array's strides, where
MLX would else copy them first. Neighbouring simdgroups take neighbouring heads of a token, which lie side by side there
and share their tables' row. Sums need no threadgroup memory: a simdgroup holds the whole head.
"""

from __future__ import annotations

from functools import cache
from math import prod

import mlx.core as mx

from smedjan.backends.mlx_metal.kernels.common import SIMD, Kernel, ceil_div, scalars

SIMDGROUPS = 8
"""Of a threadgroup: 256 threads."""

MAX_HEAD_DIM = 512
"""16 values a thread of each of x, dy and the sums."""

PROGRAMS = 1024
"""Simdgroups that share the rows of a weight's gradient."""

_HEADER = """
static constant constexpr const int SIMD = 32;

template <bool INTERLEAVED>
inline int first_of(int pair) {
  return INTERLEAVED ? 2 * pair : pair;
}

template <bool INTERLEAVED, int HALF>
inline int second_of(int pair) {
  return INTERLEAVED ? 2 * pair + 1 : pair + HALF;
}
"""

_SIMDGROUP = """
  constexpr int PAIRS = (HALF + SIMD - 1) / SIMD;
  constexpr int RESTS = (REST + SIMD - 1) / SIMD;
  constexpr int WIDTH = 2 * HALF + REST;
  const int lane = thread_index_in_simdgroup;
  const uint simd = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
"""


def _pairs(body: str) -> str:
    """`body` for each pair and each dim that is not turned, of a thread: its places and its one or two columns."""
    return f"""
    for (int n = 0; n < PAIRS; n++) {{
      const int pair = n * SIMD + lane;
      if (pair < HALF) {{
        const int one = first_of<INTERLEAVED>(pair), two = second_of<INTERLEAVED, HALF>(pair);
        {body}
      }}
    }}
"""


def _rests(body: str) -> str:
    return f"""
    for (int n = 0; n < RESTS; n++) {{
      const int column = 2 * HALF + n * SIMD + lane;
      if (column < WIDTH) {{
        {body}
      }}
    }}
"""


def _place(name: str, head: str) -> str:
    """Where a head of `name` begins, and where its row of the tables does."""
    return f"""
    const auto from = batch * {name}_strides[0] + {head} * {name}_strides[1] + token * {name}_strides[2];
    const auto next = {name}_strides[3];
    const size_t table = (size_t(cosines_shape[0] > 1 ? batch : 0) * tokens + token) * (2 * HALF);
"""


def _turned(name: str, head: str, norm: bool, inverse: bool) -> str:
    load = f"""
        first[n] = static_cast<float>({name}[from + one * next]);
        second[n] = static_cast<float>({name}[from + two * next]);
        squares += first[n] * first[n] + second[n] * second[n];"""
    load_rest = f"""
        rest[n] = static_cast<float>({name}[from + column * next]);
        squares += rest[n] * rest[n];"""
    scaled = f"""
        first[n] *= root * (constants[1] + static_cast<float>({name}_weight[one]));
        second[n] *= root * (constants[1] + static_cast<float>({name}_weight[two]));"""
    scaled_rest = f"\n        rest[n] *= root * (constants[1] + static_cast<float>({name}_weight[column]));"
    root = "\n    const float root = metal::precise::rsqrt(metal::simd_sum(squares) / WIDTH + constants[0]);"
    return f"""
    {_place(name, head)}
    const size_t to = ((size_t(batch) * {name}_shape[1] + {head}) * tokens + token) * WIDTH;
    float first[PAIRS], second[PAIRS], rest[RESTS + 1];
    float squares = 0.0f;
    {_pairs(load)}
    {_rests(load_rest)}
    {root if norm else ""}
    {
        _pairs(f'''{scaled if norm else ""}
        const float cosine = static_cast<float>(cosines[table + one]);
        const float sine = {"-" if inverse else ""}static_cast<float>(sines[table + one]);
        {name}_out[to + one] = static_cast<T>(first[n] * cosine - second[n] * sine);
        {name}_out[to + two] = static_cast<T>(second[n] * cosine + first[n] * sine);''')
    }
    {
        _rests(f'''{scaled_rest if norm else ""}
        {name}_out[to + column] = static_cast<T>(rest[n]);''')
    }
"""


@cache
def _turn(*, both: bool, norm: bool, inverse: bool) -> Kernel:
    """q, or q and k. constants: eps, offset."""
    names = ("q", "k") if both else ("q",)
    source = f"""
  {_SIMDGROUP}
  const uint q_heads = q_shape[1], heads = q_heads{" + k_shape[1]" if both else ""}, tokens = q_shape[2];
  const uint head = simd % heads, token = simd / heads % tokens, batch = simd / heads / tokens;
  if (batch < uint(q_shape[0])) {{
    if (head < q_heads) {{
      {_turned("q", "head", norm, inverse)}
    }}
    {f"else {{ {_turned('k', '(head - q_heads)', norm, inverse)} }}" if both else ""}
  }}
"""
    return Kernel(
        name=f"smedjan_{'qk' if both else 'q'}_{'norm_' if norm else ''}rope{'_inverse' if inverse else ''}",
        inputs=(*names, *(f"{name}_weight" for name in names if norm), "cosines", "sines", "constants"),
        outputs=tuple(f"{name}_out" for name in names),
        source=source,
        header=_HEADER,
        contiguous=False,
    )


def turn(
    heads: list[mx.array],
    weights: list[mx.array],
    cosines: mx.array,
    sines: mx.array,
    *,
    interleaved: bool,
    inverse: bool = False,
    eps: float = 0.0,
    offset: float = 0.0,
) -> list[mx.array]:
    """One or two of [B, H, T, D], as many weights [D] or none, tables [B or 1, 1, T, 2 HALF] -> as `heads`."""
    half, width = cosines.shape[-1] // 2, heads[0].shape[-1]
    simdgroups = sum(prod(each.shape[:3]) for each in heads)
    return _turn(both=len(heads) == 2, norm=bool(weights), inverse=inverse)(
        *heads,
        *(mx.contiguous(each) for each in (*weights, cosines, sines)),
        scalars(eps, offset),
        groups=(ceil_div(simdgroups, SIMDGROUPS), 1, 1),
        threads=SIMDGROUPS * SIMD,
        shapes=[each.shape for each in heads],
        dtypes=[each.dtype for each in heads],
        T=heads[0].dtype,
        HALF=half,
        REST=width - 2 * half,
        INTERLEAVED=interleaved,
    )


@cache
def _backward(*, dx: bool, dw: bool) -> Kernel:
    """constants: eps, offset. Simdgroup p walks over the heads p, p + programs, ..."""
    load = """
        const float cosine = static_cast<float>(cosines[table + one]);
        const float sine = static_cast<float>(sines[table + one]);
        const float dy1 = static_cast<float>(dy[over + one * dy_strides[3]]);
        const float dy2 = static_cast<float>(dy[over + two * dy_strides[3]]);
        first[n] = static_cast<float>(x[from + one * next]);
        second[n] = static_cast<float>(x[from + two * next]);
        first_g[n] = dy1 * cosine + dy2 * sine;
        second_g[n] = dy2 * cosine - dy1 * sine;
        squares += first[n] * first[n] + second[n] * second[n];"""
    load_rest = """
        rest[n] = static_cast<float>(x[from + column * next]);
        rest_g[n] = static_cast<float>(dy[over + column * dy_strides[3]]);
        squares += rest[n] * rest[n];"""

    def through(part: str, column: str) -> str:
        return f"""
        {part}[n] *= root;
        {f"{part}_sum[n] += {part}_g[n] * {part}[n];" if dw else ""}
        {part}_g[n] *= constants[1] + static_cast<float>(weight[{column}]);
        product += {part}_g[n] * {part}[n];"""

    def store(part: str, column: str) -> str:
        return f"""
        dx[to + {column}] = static_cast<T>(root * ({part}_g[n] - {part}[n] * along));"""

    along = f"""
    const float along = metal::simd_sum(product) / WIDTH;
    const size_t to = ((size_t(batch) * heads + head) * tokens + token) * WIDTH;
    {_pairs(store("first", "one") + store("second", "two"))}
    {_rests(store("rest", "column"))}"""
    zero = """
  float first_sum[PAIRS], second_sum[PAIRS], rest_sum[RESTS + 1];
  for (int n = 0; n < PAIRS; n++) {
    first_sum[n] = 0.0f;
    second_sum[n] = 0.0f;
  }
  for (int n = 0; n < RESTS; n++) {
    rest_sum[n] = 0.0f;
  }"""
    sums = f"""
    {
        _pairs('''
        dw_parts[size_t(simd) * WIDTH + one] = first_sum[n];
        dw_parts[size_t(simd) * WIDTH + two] = second_sum[n];''')
    }
    {
        _rests('''
        dw_parts[size_t(simd) * WIDTH + column] = rest_sum[n];''')
    }"""
    source = f"""
  {_SIMDGROUP}
  const uint heads = x_shape[1], tokens = x_shape[2], rows = x_shape[0] * heads * tokens;
  const uint programs = threadgroups_per_grid.x * simdgroups_per_threadgroup;
  {zero if dw else ""}
  for (uint row = simd; row < rows; row += programs) {{
    const uint head = row % heads, token = row / heads % tokens, batch = row / heads / tokens;
    {_place("x", "head")}
    const auto over = batch * dy_strides[0] + head * dy_strides[1] + token * dy_strides[2];
    float first[PAIRS], second[PAIRS], rest[RESTS + 1];
    float first_g[PAIRS], second_g[PAIRS], rest_g[RESTS + 1];
    float squares = 0.0f, product = 0.0f;
    {_pairs(load)}
    {_rests(load_rest)}
    const float root = metal::precise::rsqrt(metal::simd_sum(squares) / WIDTH + constants[0]);
    {_pairs(through("first", "one") + through("second", "two"))}
    {_rests(through("rest", "column"))}
    {along if dx else ""}
  }}
  {sums if dw else ""}
"""
    return Kernel(
        name=f"smedjan_norm_rope_bwd_{dx:d}{dw:d}",
        inputs=("x", "dy", "weight", "cosines", "sines", "constants"),
        outputs=(*(("dx",) if dx else ()), *(("dw_parts",) if dw else ())),
        source=source,
        header=_HEADER,
        contiguous=False,
    )


def norm_rope_bwd(
    x: mx.array,
    dy: mx.array,
    weight: mx.array,
    cosines: mx.array,
    sines: mx.array,
    *,
    needs: tuple[bool, bool],
    interleaved: bool,
    eps: float,
    offset: float,
) -> list[mx.array]:
    """x, dy [B, H, T, D], weight [D] -> those of dx and dw that `needs` names."""
    half, width = cosines.shape[-1] // 2, x.shape[-1]
    wants_dx, wants_dw = needs
    groups = ceil_div(prod(x.shape[:3]), SIMDGROUPS)
    if wants_dw:
        groups = min(groups, PROGRAMS // SIMDGROUPS)
    made = _backward(dx=wants_dx, dw=wants_dw)(
        x,
        dy,
        *(mx.contiguous(each) for each in (weight, cosines, sines)),
        scalars(eps, offset),
        groups=(groups, 1, 1),
        threads=SIMDGROUPS * SIMD,
        shapes=[x.shape] * wants_dx + [(groups * SIMDGROUPS, width)] * wants_dw,
        dtypes=[x.dtype] * wants_dx + [mx.float32] * wants_dw,
        T=x.dtype,
        HALF=half,
        REST=width - 2 * half,
        INTERLEAVED=interleaved,
    )
    return [*made[:wants_dx], *(each.sum(axis=0).astype(weight.dtype) for each in made[wants_dx:])]
