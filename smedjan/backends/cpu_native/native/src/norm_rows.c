/* rms_norm (Zhang & Sennrich 2019, eq. 4), with the sum of a residual stream before it, and its gradients.
 *
 *   t = x + factor * delta      rounded to the dtype of x, or x where there is no delta
 *   rstd = (mean(t^2) + eps)^(-1/2)
 *   y = t rstd w                rounded before the weight's product too ("before": Llama), or with offset + w ("after")
 *
 *   g = dy (offset + w);  dx = rstd (g - t rstd^2 mean(g t)) + acc;  dw = sum over rows of dy t rstd
 *
 * float32 inside, one rounding a result.
 */
#include "rows.h"

#define DEFINE_RMS(T)                                                                                                  \
    KERNEL smedjan_rms_fwd_##T(const step *s, int rank, int threads)                                                   \
    {                                                                                                                  \
        const int64_t rows = s->number[0], width = s->number[1];                                                       \
        const int after = (int)s->number[6];                                                                           \
        const float eps = s->real[0], offset = s->real[1], factor = s->real[2];                                        \
        const T##_t *w = s->array[2];                                                                                  \
        float *rstd_of = s->array[5];                                                                                  \
        FOR_ROWS(rows)                                                                                                 \
        {                                                                                                              \
            const T##_t *x = (const T##_t *)s->array[0] + row * s->number[2];                                          \
            const T##_t *t = x;                                                                                        \
            float squares = 0;                                                                                         \
            if (s->array[1]) {                                                                                         \
                const T##_t *delta = (const T##_t *)s->array[1] + row * s->number[3];                                  \
                T##_t *sum = (T##_t *)s->array[3] + row * s->number[4];                                                \
                SUM_OF(squares)                                                                                        \
                for (int64_t i = 0; i < width; i++) {                                                                  \
                    sum[i] = put_##T(get_##T(x[i]) + factor * get_##T(delta[i]));                                      \
                    const float wide = get_##T(sum[i]);                                                                \
                    squares += wide * wide;                                                                            \
                }                                                                                                      \
                t = sum;                                                                                               \
            } else {                                                                                                   \
                SUM_OF(squares)                                                                                        \
                for (int64_t i = 0; i < width; i++)                                                                    \
                    squares += get_##T(t[i]) * get_##T(t[i]);                                                          \
            }                                                                                                          \
            const float rstd = 1.0f / sqrtf(squares / (float)width + eps);                                             \
            if (rstd_of)                                                                                               \
                rstd_of[row * s->number[7]] = rstd;                                                                                   \
            if (!s->array[4])                                                                                          \
                continue;                                                                                              \
            T##_t *y = (T##_t *)s->array[4] + row * s->number[5];                                                      \
            if (after) {                                                                                               \
                EACH_ELEMENT                                                                                           \
                for (int64_t i = 0; i < width; i++)                                                                    \
                    y[i] = put_##T(get_##T(t[i]) * rstd * (offset + get_##T(w[i])));                                   \
            } else {                                                                                                   \
                EACH_ELEMENT                                                                                           \
                for (int64_t i = 0; i < width; i++)                                                                    \
                    y[i] = put_##T(get_##T(put_##T(get_##T(t[i]) * rstd)) * get_##T(w[i]));                            \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* dw is added to a row of float32 for each rank, which begins at zero; `smedjan_sum_parts` adds the rows. */      \
    KERNEL smedjan_rms_bwd_##T(const step *s, int rank, int threads)                                                   \
    {                                                                                                                  \
        const int64_t rows = s->number[0], width = s->number[1];                                                       \
        const float offset = s->real[0];                                                                               \
        const T##_t *w = s->array[1];                                                                                  \
        const float *rstd_of = s->array[2];                                                                            \
        float *parts = s->array[6] ? (float *)s->array[6] + rank * width : NULL;                                       \
        FOR_ROWS(rows)                                                                                                 \
        {                                                                                                              \
            const T##_t *x = (const T##_t *)s->array[0] + row * s->number[2];                                          \
            const T##_t *dy = (const T##_t *)s->array[3] + row * s->number[3];                                         \
            const float rstd = rstd_of[row * s->number[6]];                                                                           \
            if (parts) {                                                                                               \
                EACH_ELEMENT                                                                                           \
                for (int64_t i = 0; i < width; i++)                                                                    \
                    parts[i] += get_##T(dy[i]) * get_##T(x[i]) * rstd;                                                 \
            }                                                                                                          \
            if (!s->array[5])                                                                                          \
                continue;                                                                                              \
            T##_t *dx = (T##_t *)s->array[5] + row * s->number[5];                                                     \
            float projection = 0;                                                                                      \
            SUM_OF(projection)                                                                                         \
            for (int64_t i = 0; i < width; i++)                                                                        \
                projection += get_##T(dy[i]) * (offset + get_##T(w[i])) * get_##T(x[i]);                               \
            projection *= rstd * rstd / (float)width;                                                                  \
            if (s->array[4]) {                                                                                         \
                const T##_t *acc = (const T##_t *)s->array[4] + row * s->number[4];                                    \
                EACH_ELEMENT                                                                                           \
                for (int64_t i = 0; i < width; i++)                                                                    \
                    dx[i] = put_##T(                                                                                   \
                        rstd * (get_##T(dy[i]) * (offset + get_##T(w[i])) - get_##T(x[i]) * projection)                \
                        + get_##T(acc[i]));                                                                            \
            } else {                                                                                                   \
                EACH_ELEMENT                                                                                           \
                for (int64_t i = 0; i < width; i++)                                                                    \
                    dx[i] = put_##T(                                                                                   \
                        rstd * (get_##T(dy[i]) * (offset + get_##T(w[i])) - get_##T(x[i]) * projection));              \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* y[i] = sum over parts of x[part, i], x float32 */                                                               \
    KERNEL smedjan_sum_parts_##T(const step *s, int rank, int threads)                                                 \
    {                                                                                                                  \
        const int64_t count = s->number[0], width = s->number[1];                                                      \
        const float *x = s->array[0];                                                                                  \
        T##_t *y = s->array[1];                                                                                        \
        int64_t from, to;                                                                                              \
        share(width, 16, rank, threads, &from, &to);                                                                   \
        for (int64_t i = from; i < to; i++) {                                                                          \
            float total = 0;                                                                                           \
            for (int64_t part = 0; part < count; part++)                                                               \
                total += x[part * width + i];                                                                          \
            y[i] = put_##T(total);                                                                                     \
        }                                                                                                              \
    }

DEFINE_RMS(float32)
DEFINE_RMS(bfloat16)
