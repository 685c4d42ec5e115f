/* Cross-entropy of rows of logits, and its gradient in their place:
 *
 *   z = cap tanh(tilt logit), or gain * logit without a cap;  lse = log sum exp(z)
 *   loss = lse - (1 - smoothing) z[label] - smoothing mean(z) + z_loss lse^2
 *   dlogit = (exp(z - lse) (1 + 2 z_loss lse) - (1 - smoothing) [label] - smoothing / V) slope / num_items
 *   slope = gain (1 - (z / cap)^2), or gain without a cap
 *
 * A row whose label is -100 has loss 0 and gradient 0. float32 inside, one rounding of each gradient.
 */
#include "rows.h"

ALWAYS float tanh_of(float x) { return 1.0f - 2.0f / (1.0f + exp_fast(2.0f * x)); }

#define DEFINE_PASSES(T)                                                                                               \
    /* NaN is left out here and stays in the sum. */                                                                   \
    ALWAYS float largest_##T(const T##_t *x, int64_t size)                                                             \
    {                                                                                                                  \
        float top = -INFINITY;                                                                                         \
        LARGEST_OF(top)                                                                                                \
        for (int64_t i = 0; i < size; i++)                                                                             \
            top = get_##T(x[i]) > top ? get_##T(x[i]) : top;                                                           \
        return top;                                                                                                    \
    }                                                                                                                  \
                                                                                                                       \
    /* sum of exp(z - largest) */                                                                                      \
    ALWAYS float sum_exp_##T(const T##_t *x, int64_t size, float tilt, float cap, float largest)                       \
    {                                                                                                                  \
        float total = 0;                                                                                               \
        if (cap != 0.0f) {                                                                                             \
            SUM_OF(total)                                                                                              \
            for (int64_t i = 0; i < size; i++)                                                                         \
                total += exp_fast(cap * tanh_of(tilt * get_##T(x[i])) - largest);                                      \
        } else {                                                                                                       \
            SUM_OF(total)                                                                                              \
            for (int64_t i = 0; i < size; i++)                                                                         \
                total += exp_fast(tilt * get_##T(x[i]) - largest);                                                     \
        }                                                                                                              \
        return total;                                                                                                  \
    }                                                                                                                  \
                                                                                                                       \
    /* sum of z */                                                                                                     \
    ALWAYS float sum_of_##T(const T##_t *x, int64_t size, float tilt, float cap)                                       \
    {                                                                                                                  \
        float total = 0;                                                                                               \
        if (cap != 0.0f) {                                                                                             \
            SUM_OF(total)                                                                                              \
            for (int64_t i = 0; i < size; i++)                                                                         \
                total += cap * tanh_of(tilt * get_##T(x[i]));                                                          \
        } else {                                                                                                       \
            SUM_OF(total)                                                                                              \
            for (int64_t i = 0; i < size; i++)                                                                         \
                total += tilt * get_##T(x[i]);                                                                         \
        }                                                                                                              \
        return total;                                                                                                  \
    }

DEFINE_PASSES(float32)
DEFINE_PASSES(bfloat16)

#define DEFINE_CROSS_ENTROPY(T)                                                                                        \
    KERNEL smedjan_cross_entropy_##T(const step *s, int rank, int threads)                                             \
    {                                                                                                                  \
        const int64_t rows = s->number[0], vocab = s->number[1], stride = s->number[2], gradient = s->number[3];       \
        const int64_t *labels = s->array[1];                                                                           \
        const float gain = s->real[0], cap = s->real[1], z_loss = s->real[2], smoothing = s->real[3];                  \
        const float per_item = 1.0f / *(const float *)s->array[2];                                                     \
        float *losses = s->array[3];                                                                                   \
        FOR_ROWS(rows)                                                                                                 \
        {                                                                                                              \
            T##_t *x = (T##_t *)s->array[0] + row * stride;                                                            \
            const int64_t label = labels[row];                                                                         \
            if (label < 0) {                                                                                           \
                losses[row] = 0;                                                                                       \
                if (gradient)                                                                                          \
                    memset(x, 0, (size_t)vocab * sizeof *x);                                                           \
                continue;                                                                                              \
            }                                                                                                          \
            const float tilt = cap != 0.0f ? gain / cap : gain;                                                        \
            const float top = largest_##T(x, vocab);                                                                   \
            const float largest = cap != 0.0f ? cap * tanh_of(tilt * top) : tilt * top;                                \
            const float total = sum_exp_##T(x, vocab, tilt, cap, largest);                                             \
            const float rest = logf(total), lse = largest + rest;                                                      \
            const float straight = tilt * get_##T(x[label]);                                                           \
            const float chosen = cap != 0.0f ? cap * tanh_of(straight) : straight;                                     \
            float loss = largest - chosen + rest + z_loss * lse * lse;                                                 \
            if (smoothing != 0.0f)                                                                                     \
                loss += smoothing * (chosen - sum_of_##T(x, vocab, tilt, cap) / (float)vocab);                         \
            losses[row] = loss;                                                                                        \
            if (!gradient)                                                                                             \
                continue;                                                                                              \
            const float scale = (1.0f + 2.0f * z_loss * lse) / total * per_item * gain;                                \
            const float even = smoothing / (float)vocab * per_item * gain;                                             \
            const float whole = (1.0f - smoothing) * per_item * gain;                                                  \
            const float bent = cap != 0.0f ? tanh_of(straight) : 0.0f;                                                 \
            if (cap != 0.0f) {                                                                                         \
                EACH_ELEMENT                                                                                           \
                for (int64_t i = 0; i < vocab; i++) {                                                                  \
                    const float t = tanh_of(tilt * get_##T(x[i]));                                                     \
                    x[i] = put_##T((exp_fast(cap * t - largest) * scale - even) * (1.0f - t * t));                     \
                }                                                                                                      \
            } else {                                                                                                   \
                EACH_ELEMENT                                                                                           \
                for (int64_t i = 0; i < vocab; i++)                                                                    \
                    x[i] = put_##T(exp_fast(tilt * get_##T(x[i]) - largest) * scale - even);                           \
            }                                                                                                          \
            x[label] = put_##T((exp_fast(chosen - largest) * scale - even - whole) * (1.0f - bent * bent));            \
        }                                                                                                              \
    }

DEFINE_CROSS_ENTROPY(float32)
DEFINE_CROSS_ENTROPY(bfloat16)
