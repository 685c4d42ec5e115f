"""rms_norm and layer_norm, alone or behind a residual sum, and their gradients: a row to a threadgroup.

    sum  = x + factor * delta, rounded to x's dtype        where there is a delta; else sum = x
    n    = sum * rstd,            rstd = (mean(sum^2) + eps)^(-1/2)                          rms_norm
    n    = (sum - mean) * rstd,   rstd = (mean((sum - mean)^2) + eps)^(-1/2)                 layer_norm
    y    = n * (offset + weight) + bias

    g    = dy * (offset + weight)
    dx   = rstd (g - n mean(g n)) + acc                                                      rms_norm
    dx   = rstd (g - mean(g) - n mean(g n)) + acc                                            layer_norm
    dw   = sum over rows of dy n,  db = sum over rows of dy

Everything in float32 and rounded once, but for `cast_before`, Llama's order: n is rounded to x's dtype before the
weight meets it. A thread holds its values of a row in registers, HELD at most, so that a row is read once.

A weight's gradient is made in two stages, whose order of sums hangs on the shape alone: a threadgroup of the backward
kernel walks over every PROGRAMS-th row and adds up in registers, then `mx.sum` adds what the threadgroups found.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import mlx.core as mx

from smedjan.backends.mlx_metal.kernels.common import REDUCE, RUN, Kernel, ceil_div, run_of, scalars, threads_for

THREADS = 512
HELD = 16
"""Values of a row that a thread holds. Backwards of n, g, dw and db: some 90 words, which leaves 512 threads."""

MAX_WIDTH = THREADS * HELD

PROGRAMS = 256
"""Threadgroups that share the rows of a weight's gradient: some for each core of the largest GPU (80 cores)."""

_PLACE = """
  const int thread_id = thread_position_in_threadgroup.x;
  const int step = threads_per_threadgroup.x * RUN;
  const uint lane = thread_index_in_simdgroup;
  const uint simdgroup = simdgroup_index_in_threadgroup;
  const uint simdgroups = simdgroups_per_threadgroup;
  const int width = x_shape[1];
"""


def _each(body: str) -> str:
    """`body` for each value that a thread holds, with its place in the thread and in the row."""
    placed = f"""
          const int at = run * RUN + i, column = start + i;
          {body}
        """
    return f"""
    for (int run = 0; run < RUNS; run++) {{
      const int start = run * step + thread_id * RUN;
      {run_of("width", placed)}
    }}
"""


@cache
def _forward(*, add: bool, layer: bool, biased: bool) -> Kernel:
    """constants: eps, offset, factor. RUNS * RUN values a thread."""
    summed = """
        const float extra = static_cast<float>(delta[base + column]);
        const T rounded = static_cast<T>(held[at] + constants[2] * extra);
        sum[base + column] = rounded;
        held[at] = static_cast<float>(rounded);"""
    load = f"""
        held[at] = static_cast<float>(x[base + column]);{summed if add else ""}
        total += held[at]{"" if layer else " * held[at]"};
      """
    moments = f"""
  threadgroup float others[SIMD];
  const float average = group_sum(total, parts, lane, simdgroup, simdgroups) / width;
  float spread = 0.0f;
  {
        _each('''
        held[at] -= average;
        spread += held[at] * held[at];
      ''')
    }
  const float variance = group_sum(spread, others, lane, simdgroup, simdgroups) / width;
"""
    squares = "\n  const float variance = group_sum(total, parts, lane, simdgroup, simdgroups) / width;\n"
    store = f"""
        float normed = held[at] * root;
        if (CAST_BEFORE) {{
          normed = static_cast<float>(static_cast<T>(normed));
        }}
        const float gain = constants[1] + static_cast<float>(weight[column]);
        y[base + column] = static_cast<T>(normed * gain{" + static_cast<float>(bias[column])" if biased else ""});
      """
    source = f"""
  threadgroup float parts[SIMD];
  const uint row = threadgroup_position_in_grid.x;
{_PLACE}
  const size_t base = size_t(row) * width;
  float held[RUNS * RUN];
  float total = 0.0f;
  {_each(load)}
  {moments if layer else squares}
  const float root = metal::precise::rsqrt(variance + constants[0]);
  {_each(store)}
  if (thread_id == 0) {{
    {"mean[row] = average;" if layer else ""}
    rstd[row] = root;
  }}
"""
    return Kernel(
        name=f"smedjan_{'add_' if add else ''}{'layer' if layer else 'rms'}_norm{'_bias' if biased else ''}",
        inputs=("x", *(("delta",) if add else ()), "weight", *(("bias",) if biased else ()), "constants"),
        outputs=(*(("sum",) if add else ()), "y", *(("mean",) if layer else ()), "rstd"),
        source=source,
        header=REDUCE,
    )


def norm(
    x: mx.array,
    delta: mx.array | None,
    weight: mx.array,
    bias: mx.array | None,
    *,
    layer: bool,
    eps: float,
    offset: float = 0.0,
    factor: float = 1.0,
    cast_before: bool = False,
) -> list[mx.array]:
    """x, delta [..., D], weight, bias [D] -> [sum, where there is a delta,] y [..., D], [mean and] rstd [...]"""
    width, lead = x.shape[-1], x.shape[:-1]
    threads = threads_for(width, THREADS)
    given = [each.reshape(-1, width) for each in (x, delta) if each is not None]
    wide, saved = 1 if delta is None else 2, 2 if layer else 1
    made = _forward(add=delta is not None, layer=layer, biased=bias is not None)(
        *given,
        weight,
        *(() if bias is None else (bias,)),
        scalars(eps, offset, factor),
        groups=(prod(lead), 1, 1),
        threads=threads,
        shapes=[(prod(lead), width)] * wide + [(prod(lead),)] * saved,
        dtypes=[x.dtype] * wide + [mx.float32] * saved,
        T=x.dtype,
        RUNS=ceil_div(width, threads * RUN),
        CAST_BEFORE=cast_before,
    )
    return [*(each.reshape(x.shape) for each in made[:wide]), *(each.reshape(lead) for each in made[wide:])]


@cache
def _backward(*, layer: bool, waits: bool, dx: bool, dw: bool, db: bool) -> Kernel:
    """constants: offset. Threadgroup p walks over the rows p, p + programs, ...

    `parts` are two sets of partial sums, taken in turn: the barrier of a row lies between the reads of the row before
    and the next writes to its set.
    """
    load = f"""
        const float cotangent = static_cast<float>(dy[base + column]);
        normed[at] = (static_cast<float>(x[base + column]){" - mean[row]" if layer else ""}) * root;
        through[at] = cotangent * (constants[0] + static_cast<float>(weight[column]));
        product += through[at] * normed[at];
        {"plain += through[at];" if layer else ""}
        {"dw[at] += cotangent * (CAST_BEFORE ? float(static_cast<T>(normed[at])) : normed[at]);" if dw else ""}
        {"db[at] += cotangent;" if db else ""}
      """
    store = f"""
        float gradient = through[at]{" - average" if layer else ""} - normed[at] * along;
        gradient = root * gradient{" + static_cast<float>(acc[base + column])" if waits else ""};
        dx[base + column] = static_cast<T>(gradient);
      """
    through = f"""
    threadgroup float* set = parts + turn * {2 if layer else 1} * SIMD;
    {"const float average = group_sum(plain, set + SIMD, lane, simdgroup, simdgroups) / width;" if layer else ""}
    const float along = group_sum(product, set, lane, simdgroup, simdgroups) / width;
    {_each(store)}
"""
    sums = [name for name, wanted in (("dw", dw), ("db", db)) if wanted]
    out = "".join(f"\n        {name}_parts[program * width + column] = {name}[at];" for name in sums)
    source = f"""
  {f"threadgroup float parts[{4 if layer else 2} * SIMD];" if dx else ""}
  const uint program = threadgroup_position_in_grid.x;
{_PLACE}
  {" ".join(f"float {name}[RUNS * RUN];" for name in sums)}
  for (int at = 0; at < RUNS * RUN; at++) {{
    {" ".join(f"{name}[at] = 0.0f;" for name in sums)}
  }}
  int turn = 0;
  for (int row = program; row < x_shape[0]; row += threadgroups_per_grid.x) {{
    const size_t base = size_t(row) * width;
    const float root = rstd[row];
    float normed[RUNS * RUN], through[RUNS * RUN];
    float product = 0.0f, plain = 0.0f;
    {_each(load)}
    {through if dx else ""}
    turn = 1 - turn;
  }}
  {_each(out + chr(10) + "      ") if sums else ""}
"""
    return Kernel(
        name=f"smedjan_{'layer' if layer else 'rms'}_norm_bwd_{waits:d}{dx:d}{dw:d}{db:d}",
        inputs=(
            *("x", "weight"),
            *(("mean",) if layer else ()),
            *("rstd", "dy"),
            *(("acc",) if waits else ()),
            "constants",
        ),
        outputs=(*(("dx",) if dx else ()), *(f"{name}_parts" for name in sums)),
        source=source,
        header=REDUCE,
    )


def norm_bwd(
    x: mx.array,
    weight: mx.array,
    mean: mx.array | None,
    rstd: mx.array,
    dy: mx.array,
    acc: mx.array | None,
    *,
    needs: Sequence[bool],
    offset: float = 0.0,
    cast_before: bool = False,
) -> list[mx.array]:
    """x, dy, acc [..., D], weight [D], mean, rstd [...] -> those of dx, dw and db that `needs` names."""
    wants_dx, wants_dw, wants_db = (*needs, False)[:3]
    width, rows = x.shape[-1], prod(x.shape[:-1])
    threads = threads_for(width, THREADS)
    sums = wants_dw + wants_db
    programs = min(rows, PROGRAMS) if sums else rows
    waiting = acc if wants_dx else None
    kernel = _backward(layer=mean is not None, waits=waiting is not None, dx=wants_dx, dw=wants_dw, db=wants_db)
    made = kernel(
        x.reshape(-1, width),
        weight,
        *(() if mean is None else (mean.reshape(-1),)),
        rstd.reshape(-1),
        dy.reshape(-1, width),
        *(() if waiting is None else (waiting.reshape(-1, width),)),
        scalars(offset),
        groups=(programs, 1, 1),
        threads=threads,
        shapes=[(rows, width)] * wants_dx + [(programs, width)] * sums,
        dtypes=[x.dtype] * wants_dx + [mx.float32] * sums,
        T=x.dtype,
        RUNS=ceil_div(width, threads * RUN),
        CAST_BEFORE=cast_before,
    )
    return [
        *(each.reshape(x.shape) for each in made[:wants_dx]),
        *(each.sum(axis=0).astype(weight.dtype) for each in made[wants_dx:]),
    ]
