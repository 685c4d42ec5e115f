"""Cross-entropy of rows of logits and its gradient, a threadgroup to a row. A row is read twice and written once.

    z = unit * s        s = v, unit = gain                          of a logit v
                        s = tanh(tilt v), unit = cap                capped, tilt = gain / cap
    lse  = log(sum over v of exp(z))
    loss = lse - (1 - e) z[label] - e mean(z) + z_loss lse^2
    dz   = (1 + 2 z_loss lse) softmax(z) - (1 - e) onehot(label) - e / V

What is written is dz dz/dv / num_items, in the logits' dtype: dz/dv = gain, capped gain (1 - s^2). Of a row whose label
is -100 the loss and the gradient are 0 and no logit is read; a label outside the vocabulary makes its loss NaN.

The first pass keeps an online softmax in each thread, the largest s and the sum of exponentials under it (Milakov and
Gimelshein 2018, algorithm 3), which are joined in the simdgroup and then across the 32 that a threadgroup may have. The
second goes back from the row's end, which the first has left in the cache. Making the gradient with the loss is Liger
Kernel's idea (Hsu et al. 2024, section 3.2).
"""

from __future__ import annotations

import mlx.core as mx

from smedjan.backends.mlx_metal.kernels.common import REDUCE, Kernel, run_of, scalars, threads_for

THREADS = 512

_HEADER = (
    REDUCE
    + """
static constant constexpr const int IGNORE = -100;

// Below every logit, and finite: a thread without logits gives exp(-inf) = 0 and not exp(-inf + inf).
static constant constexpr const float LOWEST = -1.0e30f;

template <bool CAPPED>
inline float score_of(float value, float tilt) {
  return CAPPED ? metal::precise::tanh(value * tilt) : value;
}
"""
)

_SCORES = """
          scores[i] = score_of<CAPPED>(static_cast<float>(values[start + i]), tilt);
          plain += scores[i];
          higher = metal::max(higher, scores[i]);
        """

_LOSS = f"""
  threadgroup float peaks[SIMD];
  threadgroup float totals[SIMD];
  threadgroup float plains[SIMD];
  const uint row = threadgroup_position_in_grid.x;
  const int thread_id = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint simdgroup = simdgroup_index_in_threadgroup;
  const uint simdgroups = simdgroups_per_threadgroup;
  const int step = threads_per_threadgroup.x * RUN;
  const int vocab = logits_shape[1];
  const float tilt = shaping[0], unit = shaping[1], gain = shaping[2], z_loss = shaping[3], smoothing = shaping[4];
  const int label = labels[row];
  auto values = logits + size_t(row) * vocab;
  const bool trained = label != IGNORE;

  float peak = LOWEST, total = 0.0f, plain = 0.0f;
  for (int start = thread_id * RUN; trained && start < vocab; start += step) {{
    float scores[RUN];
    float higher = peak;
    for (int i = 0; i < RUN; i++) {{
      scores[i] = -INFINITY;
    }}
    {run_of("vocab", _SCORES)}
    total *= metal::precise::exp((peak - higher) * unit);
    for (int i = 0; i < RUN; i++) {{
      total += metal::precise::exp((scores[i] - higher) * unit);
    }}
    peak = higher;
  }}
  const float simd_peak = metal::simd_max(peak);
  const float simd_total = metal::simd_sum(total * metal::precise::exp((peak - simd_peak) * unit));
  const float simd_plain = metal::simd_sum(plain);
  if (lane == 0) {{
    peaks[simdgroup] = simd_peak;
    totals[simdgroup] = simd_total;
    plains[simdgroup] = simd_plain;
  }}
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  // Each simdgroup joins all of them: no second barrier, and every thread knows the result.
  const bool joins = lane < simdgroups;
  const float each_peak = joins ? peaks[lane] : LOWEST;
  const float highest = metal::simd_max(each_peak);
  const float sum = metal::simd_sum((joins ? totals[lane] : 0.0f) * metal::precise::exp((each_peak - highest) * unit));
  const float all = metal::simd_sum(joins ? plains[lane] : 0.0f);
  const float log_sum = metal::precise::log(sum);
  const float lse = highest * unit + log_sum;
  if (thread_id == 0) {{
    float loss = 0.0f;
    if (trained) {{
      const bool inside = label >= 0 && label < vocab;
      const float target = inside ? score_of<CAPPED>(static_cast<float>(values[label]), tilt) : NAN;
      float below = highest - target;
      if (smoothing != 0.0f) {{
        below = (1.0f - smoothing) * below + smoothing * (highest - all / vocab);
      }}
      // Apart from lse, whose own rounding a large peak would bring in.
      loss = below * unit + log_sum + z_loss * lse * lse;
    }}
    losses[row] = loss;
  }}
"""

_TRAINED = """
          const int column = start + i;
          const float score = score_of<CAPPED>(static_cast<float>(values[column]), tilt);
          float gradient = metal::precise::exp((score - highest) * unit) * share - each;
          gradient = column == label ? gradient - aim : gradient;
          gradient = CAPPED ? gradient * (1.0f - score * score) : gradient;
          gradients[column] = static_cast<T>(gradient);
        """

_GRADIENT = f"""
  auto gradients = dlogits + size_t(row) * vocab;
  const float scale = gain / num_items;
  const float share = (1.0f + 2.0f * z_loss * lse) / sum * scale;
  const float aim = (1.0f - smoothing) * scale;
  const float each = smoothing / vocab * scale;
  const int last = (vocab - 1) / step * step + thread_id * RUN;
  for (int start = last; start >= 0; start -= step) {{
    if (trained) {{
      {run_of("vocab", _TRAINED)}
    }} else {{
      {run_of("vocab", "gradients[start + i] = static_cast<T>(0.0f);")}
    }}
  }}
"""

LOSS = Kernel(
    name="smedjan_cross_entropy_loss",
    inputs=("logits", "labels", "shaping"),
    outputs=("losses",),
    source=_LOSS,
    header=_HEADER,
)
LOSS_AND_GRADIENT = Kernel(
    name="smedjan_cross_entropy",
    inputs=("logits", "labels", "num_items", "shaping"),
    outputs=("losses", "dlogits"),
    source=_LOSS + _GRADIENT,
    header=_HEADER,
)


def cross_entropy(
    logits: mx.array,
    labels: mx.array,
    num_items: mx.array,
    *,
    gradient: bool,
    factor: float,
    cap: float,
    z_loss: float,
    smoothing: float,
) -> tuple[mx.array, mx.array | None]:
    """logits [N, V], labels [N] int32, num_items float32 [] -> losses [N] float32, dlogits [N, V] in logits' dtype."""
    rows, vocab = logits.shape
    shaping = scalars(factor / cap if cap else 1.0, cap or factor, factor, z_loss, smoothing)
    threads = threads_for(vocab, THREADS)
    if not gradient:
        (losses,) = LOSS(
            logits,
            labels,
            shaping,
            groups=(rows, 1, 1),
            threads=threads,
            shapes=[(rows,)],
            dtypes=[mx.float32],
            CAPPED=bool(cap),
        )
        return losses, None
    losses, dlogits = LOSS_AND_GRADIENT(
        logits,
        labels,
        num_items,
        shaping,
        groups=(rows, 1, 1),
        threads=threads,
        shapes=[(rows,), (rows, vocab)],
        dtypes=[mx.float32, logits.dtype],
        T=logits.dtype,
        CAPPED=bool(cap),
    )
    return losses, dlogits
