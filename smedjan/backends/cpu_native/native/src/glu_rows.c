/* y = act(gate) * up, and   dgate = dy up act'(gate),  dup = dy act(gate)
 *
 * float32 inside, one rounding a result. act by number: 0 silu, 1 gelu by tanh (Hendrycks & Gimpel 2016), 2 relu,
 * 3 relu squared (So et al. 2021).
 */
#include "rows.h"

/* exp(-x), not so large that its product with sigmoid(x) would be infinity times zero */
ALWAYS float falling(float x) { return exp_fast(x < -80.0f ? 80.0f : -x); }
ALWAYS float sigmoid(float x) { return 1.0f / (1.0f + falling(x)); }

/* sigmoid(x) (1 - sigmoid(x)) without the difference, which would cancel */
ALWAYS float sigmoid_slope(float x)
{
    const float e = falling(x), s = 1.0f / (1.0f + e);
    return e * s * s;
}

ALWAYS float silu(float x) { return x / (1.0f + falling(x)); }
ALWAYS float silu_slope(float x) { return sigmoid(x) + x * sigmoid_slope(x); }

/* gelu(x) = x sigmoid(2 k (x + c x^3)), since (1 + tanh u) / 2 = sigmoid(2 u) */
#define GELU_K 1.5957691216057308f
#define GELU_C 0.044715f
ALWAYS float bent(float x) { return GELU_K * (x + GELU_C * x * x * x); }
ALWAYS float gelu(float x) { return x * sigmoid(bent(x)); }
ALWAYS float gelu_slope(float x)
{
    return sigmoid(bent(x)) + x * sigmoid_slope(bent(x)) * GELU_K * (1.0f + 3.0f * GELU_C * x * x);
}

ALWAYS float relu(float x) { return x > 0.0f ? x : x != x ? x : 0.0f; }
ALWAYS float relu_slope(float x) { return x > 0.0f ? 1.0f : 0.0f; }
ALWAYS float relu2(float x) { return relu(x) * relu(x); }
ALWAYS float relu2_slope(float x) { return 2.0f * relu(x); }

#define FORWARD(T, act)                                                                                                \
    EACH_ELEMENT                                                                                                       \
    for (int64_t i = 0; i < width; i++)                                                                                \
        y[i] = put_##T(act(get_##T(gate[i])) * get_##T(up[i]));                                                        \
    break;

#define BACKWARD(T, act)                                                                                               \
    if (dgate && dup) {                                                                                                \
        EACH_ELEMENT                                                                                                   \
        for (int64_t i = 0; i < width; i++) {                                                                          \
            const float g = get_##T(gate[i]), u = get_##T(up[i]), d = get_##T(dy[i]);                                  \
            dgate[i] = put_##T(d * u * act##_slope(g));                                                                \
            dup[i] = put_##T(d * act(g));                                                                              \
        }                                                                                                              \
    } else if (dgate) {                                                                                                \
        EACH_ELEMENT                                                                                                   \
        for (int64_t i = 0; i < width; i++)                                                                            \
            dgate[i] = put_##T(get_##T(dy[i]) * get_##T(up[i]) * act##_slope(get_##T(gate[i])));                       \
    } else {                                                                                                           \
        EACH_ELEMENT                                                                                                   \
        for (int64_t i = 0; i < width; i++)                                                                            \
            dup[i] = put_##T(get_##T(dy[i]) * act(get_##T(gate[i])));                                                  \
    }                                                                                                                  \
    break;

#define DEFINE_GLU(T)                                                                                                  \
    KERNEL smedjan_glu_fwd_##T(const step *s, int rank, int threads)                                                   \
    {                                                                                                                  \
        const int64_t width = s->number[1];                                                                            \
        FOR_ROWS(s->number[0])                                                                                         \
        {                                                                                                              \
            const T##_t *gate = (const T##_t *)s->array[0] + row * s->number[2];                                       \
            const T##_t *up = (const T##_t *)s->array[1] + row * s->number[3];                                         \
            T##_t *y = (T##_t *)s->array[2] + row * s->number[4];                                                      \
            switch (s->number[5]) {                                                                                    \
            case 0: FORWARD(T, silu)                                                                                   \
            case 1: FORWARD(T, gelu)                                                                                   \
            case 2: FORWARD(T, relu)                                                                                   \
            default: FORWARD(T, relu2)                                                                                 \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    KERNEL smedjan_glu_bwd_##T(const step *s, int rank, int threads)                                                   \
    {                                                                                                                  \
        const int64_t width = s->number[1];                                                                            \
        FOR_ROWS(s->number[0])                                                                                         \
        {                                                                                                              \
            const T##_t *gate = (const T##_t *)s->array[0] + row * s->number[2];                                       \
            const T##_t *up = (const T##_t *)s->array[1] + row * s->number[3];                                         \
            const T##_t *dy = (const T##_t *)s->array[2] + row * s->number[4];                                         \
            T##_t *dgate = s->array[3] ? (T##_t *)s->array[3] + row * s->number[5] : NULL;                             \
            T##_t *dup = s->array[4] ? (T##_t *)s->array[4] + row * s->number[6] : NULL;                               \
            switch (s->number[7]) {                                                                                    \
            case 0: BACKWARD(T, silu)                                                                                  \
            case 1: BACKWARD(T, gelu)                                                                                  \
            case 2: BACKWARD(T, relu)                                                                                  \
            default: BACKWARD(T, relu2)                                                                                \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_GLU(float32)
DEFINE_GLU(bfloat16)
