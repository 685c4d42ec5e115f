/* Rotary tables of one position, and the norm and rotation of the heads of one token. Arithmetic is float32. */
#include "tape.h"
#include "vector.h"

/* cos(p f), sin(p f) times a factor, each frequency twice: at i and half + i, or at 2i and 2i + 1.
 * arrays: position (int64), f (float32), cos, sin.  numbers: frequencies, interleaved.  reals: factor */
#define DEFINE_TABLES(act)                                                                                             \
    void rope_tables_##act(const step *s, int rank, int threads)                                                       \
    {                                                                                                                  \
        const float position = (float)*(const int64_t *)s->array[0], *f = s->array[1];                                 \
        const int64_t half = s->number[0], interleaved = s->number[1];                                                 \
        act##_t *c = s->array[2], *n = s->array[3];                                                                    \
        int64_t from, to;                                                                                              \
        share(half, 16, rank, threads, &from, &to);                                                                    \
        for (int64_t i = from; i < to; i++) {                                                                          \
            const int64_t one = interleaved ? 2 * i : i, two = interleaved ? 2 * i + 1 : half + i;                     \
            c[one] = c[two] = put_##act(cosf(position * f[i]) * s->real[0]);                                           \
            n[one] = n[two] = put_##act(sinf(position * f[i]) * s->real[0]);                                           \
        }                                                                                                              \
    }

/* Heads of q and k: y = rope(rms_norm(x)), the norm only where there are weights. One head a work item.
 * arrays: q, k, q_weight, k_weight (or NULL), cos, sin, q's y, k's y
 * numbers: q heads, k heads, head dim, rotated dims, interleaved, before.  reals: eps, offset */
#define DEFINE_QK(act, table)                                                                                          \
    void qk_norm_rope_##act##_##table(const step *s, int rank, int threads)                                            \
    {                                                                                                                  \
        const int64_t queries = s->number[0], dim = s->number[2], turned = s->number[3], half = turned / 2;            \
        const table##_t *c = s->array[4], *n = s->array[5];                                                            \
        int64_t from, to;                                                                                              \
        share(queries + s->number[1], 1, rank, threads, &from, &to);                                                   \
        float x[dim];                                                                                                  \
        for (int64_t item = from; item < to; item++) {                                                                 \
            const int which = item >= queries;                                                                         \
            const int64_t start = (which ? item - queries : item) * dim;                                               \
            const act##_t *given = (const act##_t *)s->array[which] + start, *weight = s->array[2 + which];            \
            act##_t *y = (act##_t *)s->array[6 + which] + start;                                                       \
            float squares = 0;                                                                                         \
            SUM_OF(squares)                                                                                            \
            for (int64_t i = 0; i < dim; i++) {                                                                        \
                x[i] = get_##act(given[i]);                                                                            \
                squares += x[i] * x[i];                                                                                \
            }                                                                                                          \
            if (weight) {                                                                                              \
                const float rstd = 1.0f / sqrtf(squares / (float)dim + s->real[0]);                                    \
                for (int64_t i = 0; i < dim; i++)                                                                      \
                    x[i] = s->number[5] ? get_##act(put_##act(x[i] * rstd)) * get_##act(weight[i])                     \
                                        : x[i] * rstd * (s->real[1] + get_##act(weight[i]));                           \
                for (int64_t i = 0; i < dim; i++)                                                                      \
                    x[i] = get_##act(put_##act(x[i]));                                                                 \
            }                                                                                                          \
            for (int64_t i = 0; i < half; i++) {                                                                       \
                const int64_t one = s->number[4] ? 2 * i : i, two = s->number[4] ? 2 * i + 1 : half + i;               \
                y[one] = put_##act(x[one] * get_##table(c[one]) - x[two] * get_##table(n[one]));                       \
                y[two] = put_##act(x[two] * get_##table(c[two]) + x[one] * get_##table(n[two]));                       \
            }                                                                                                          \
            for (int64_t i = turned; i < dim; i++)                                                                     \
                y[i] = put_##act(x[i]);                                                                                \
        }                                                                                                              \
    }

DEFINE_TABLES(float32)
DEFINE_TABLES(bfloat16)
DEFINE_QK(float32, float32)
DEFINE_QK(bfloat16, bfloat16)
DEFINE_QK(bfloat16, float32)
