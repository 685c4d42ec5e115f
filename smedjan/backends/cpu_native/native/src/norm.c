/* Root-mean-square norms of rows, alone and behind a residual sum. Statistics and products are float32. */
#include "tape.h"
#include "vector.h"

/* The sum of squares of a row, then y: rounded before the weight (before = 1) or once, behind it. */
#define DEFINE_NORM(act)                                                                                               \
    static float norm_row_##act(const act##_t *x, const act##_t *weight, act##_t *y, int64_t size, float eps,          \
                                float offset, int64_t before)                                                          \
    {                                                                                                                  \
        float squares = 0;                                                                                             \
        SUM_OF(squares)                                                                                                \
        for (int64_t i = 0; i < size; i++)                                                                             \
            squares += get_##act(x[i]) * get_##act(x[i]);                                                              \
        const float rstd = 1.0f / sqrtf(squares / (float)size + eps);                                                  \
        if (before)                                                                                                    \
            for (int64_t i = 0; i < size; i++)                                                                         \
                y[i] = put_##act(get_##act(put_##act(get_##act(x[i]) * rstd)) * get_##act(weight[i]));                 \
        else                                                                                                           \
            for (int64_t i = 0; i < size; i++)                                                                         \
                y[i] = put_##act(get_##act(x[i]) * rstd * (offset + get_##act(weight[i])));                            \
        return rstd;                                                                                                   \
    }                                                                                                                  \
                                                                                                                       \
    /* arrays: x, weight, y, rstd (float32).  numbers: rows, columns, before.  reals: eps, offset */                   \
    void rms_norm_##act(const step *s, int rank, int threads)                                                          \
    {                                                                                                                  \
        const int64_t size = s->number[1];                                                                             \
        int64_t from, to;                                                                                              \
        share(s->number[0], 1, rank, threads, &from, &to);                                                             \
        for (int64_t row = from; row < to; row++)                                                                      \
            ((float *)s->array[3])[row] =                                                                              \
                norm_row_##act((act##_t *)s->array[0] + row * size, s->array[1], (act##_t *)s->array[2] + row * size,  \
                               size, s->real[0], s->real[1], s->number[2]);                                            \
    }                                                                                                                  \
                                                                                                                       \
    /* total = x + factor delta, y = rms_norm(total)                                                                   \
     * arrays: x, delta, weight, total, y, rstd.  numbers: rows, columns, before.  reals: eps, offset, factor */       \
    void add_rms_norm_##act(const step *s, int rank, int threads)                                                      \
    {                                                                                                                  \
        const int64_t size = s->number[1];                                                                             \
        const float factor = s->real[2];                                                                               \
        int64_t from, to;                                                                                              \
        share(s->number[0], 1, rank, threads, &from, &to);                                                             \
        for (int64_t row = from; row < to; row++) {                                                                    \
            const act##_t *x = (act##_t *)s->array[0] + row * size, *delta = (act##_t *)s->array[1] + row * size;      \
            act##_t *total = (act##_t *)s->array[3] + row * size;                                                      \
            for (int64_t i = 0; i < size; i++)                                                                         \
                total[i] = put_##act(get_##act(x[i]) + get_##act(put_##act(factor * get_##act(delta[i]))));            \
            ((float *)s->array[5])[row] = norm_row_##act(total, s->array[2], (act##_t *)s->array[4] + row * size,      \
                                                         size, s->real[0], s->real[1], s->number[2]);                  \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* y = x + factor delta.  arrays: x, delta, y.  numbers: count.  reals: factor */                                  \
    void add_##act(const step *s, int rank, int threads)                                                               \
    {                                                                                                                  \
        const act##_t *x = s->array[0], *delta = s->array[1];                                                          \
        act##_t *y = s->array[2];                                                                                      \
        int64_t from, to;                                                                                              \
        share(s->number[0], 1024, rank, threads, &from, &to);                                                          \
        for (int64_t i = from; i < to; i++)                                                                            \
            y[i] = put_##act(get_##act(x[i]) + get_##act(put_##act(s->real[0] * get_##act(delta[i]))));                \
    }                                                                                                                  \
                                                                                                                       \
    /* y = factor x.  arrays: x, y.  numbers: count.  reals: factor */                                                 \
    void scale_##act(const step *s, int rank, int threads)                                                             \
    {                                                                                                                  \
        const act##_t *x = s->array[0];                                                                                \
        act##_t *y = s->array[1];                                                                                      \
        int64_t from, to;                                                                                              \
        share(s->number[0], 1024, rank, threads, &from, &to);                                                          \
        for (int64_t i = from; i < to; i++)                                                                            \
            y[i] = put_##act(s->real[0] * get_##act(x[i]));                                                            \
    }

DEFINE_NORM(float32)
DEFINE_NORM(bfloat16)
