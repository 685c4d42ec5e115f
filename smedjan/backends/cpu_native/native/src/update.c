/* The update: sums of squares for the global norm, and AdamW (Loshchilov & Hutter 2019, algorithm 2).
 *
 *   g = grad * clip;  p -= lr wd p;  m += (1 - b1)(g - m);  v = b2 v + (1 - b2) g^2
 *   p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
 *
 * Each array of either dtype: float32 inside, p, m and v rounded once as they are written, and none before the others
 * are made of it. `narrow`, where there is one, gets p rounded. Numbers of the step (shrink = 1 - lr wd,
 * rate = lr / (1 - b1^t), root = sqrt(1 - b2^t)) are folded by the host in float64. Where the norm is not finite,
 * nothing changes.
 */
#include "rows.h"

#include <float.h>

#define DEFINE_SQUARES(T)                                                                                              \
    /* parts[rank] += sum of x^2, in float64 */                                                                        \
    KERNEL smedjan_squares_##T(const step *s, int rank, int threads)                                                   \
    {                                                                                                                  \
        const T##_t *x = s->array[0];                                                                                  \
        double *parts = s->array[1], total = 0;                                                                        \
        int64_t from, to;                                                                                              \
        share(s->number[0], 16, rank, threads, &from, &to);                                                            \
        SUM_OF(total)                                                                                                  \
        for (int64_t i = from; i < to; i++)                                                                            \
            total += (double)get_##T(x[i]) * (double)get_##T(x[i]);                                                    \
        parts[rank * 8] += total; /* a cache line for each rank */                                                     \
    }

DEFINE_SQUARES(float32)
DEFINE_SQUARES(bfloat16)

/* norm = sqrt(sum of parts), coefficient = min(1, max_norm / (norm + 1e-6)); the parts are zero again. */
KERNEL smedjan_norm(const step *s, int rank, int threads)
{
    (void)threads;
    if (rank != 0)
        return;
    double *parts = s->array[0], total = 0;
    for (int64_t part = 0; part < s->number[0]; part++) {
        total += parts[part * 8];
        parts[part * 8] = 0;
    }
    const float norm = (float)sqrt(total), most = s->real[0] / (norm + 1e-6f);
    if (s->array[1])
        *(float *)s->array[1] = norm;
    if (s->array[2])
        *(float *)s->array[2] = most < 1.0f ? most : most != most ? most : 1.0f;
}

#define DEFINE_ADAMW(P, G, M)                                                                                          \
    KERNEL smedjan_adamw_##P##_##G##_##M(const step *s, int rank, int threads)                                         \
    {                                                                                                                  \
        P##_t *p = s->array[0];                                                                                        \
        M##_t *m = s->array[2], *v = s->array[3];                                                                      \
        const G##_t *grad = s->array[1];                                                                               \
        bf16 *narrowed = s->array[4];                                                                                  \
        const float *now = s->array[5], clip = s->array[6] ? *(const float *)s->array[6] : 1.0f;                       \
        const float *norm = s->array[7];                                                                               \
        if (norm && !(fabsf(*norm) <= FLT_MAX))                                                                        \
            return;                                                                                                    \
        const float shrink = now[0], rate = now[1], root = now[2];                                                     \
        const float one_less_b1 = s->real[0], b2 = s->real[1], one_less_b2 = s->real[2], eps = s->real[3];             \
        int64_t from, to;                                                                                              \
        share(s->number[0], 16, rank, threads, &from, &to);                                                            \
        EACH_ELEMENT                                                                                                   \
        for (int64_t i = from; i < to; i++) {                                                                          \
            const float g = get_##G(grad[i]) * clip;                                                                   \
            const float old = get_##M(m[i]), first = old + one_less_b1 * (g - old);                                    \
            const float second = b2 * get_##M(v[i]) + one_less_b2 * g * g;                                             \
            m[i] = put_##M(first);                                                                                     \
            v[i] = put_##M(second);                                                                                    \
            p[i] = put_##P(get_##P(p[i]) * shrink - rate * (first / (sqrtf(second) / root + eps)));                    \
        }                                                                                                              \
        if (narrowed)                                                                                                  \
            for (int64_t i = from; i < to; i++)                                                                        \
                narrowed[i] = narrow(get_##P(p[i]));                                                                   \
    }

DEFINE_ADAMW(float32, float32, float32)
DEFINE_ADAMW(float32, bfloat16, float32)
DEFINE_ADAMW(bfloat16, float32, bfloat16)
DEFINE_ADAMW(bfloat16, bfloat16, bfloat16)
DEFINE_ADAMW(bfloat16, float32, float32)
DEFINE_ADAMW(bfloat16, bfloat16, float32)
