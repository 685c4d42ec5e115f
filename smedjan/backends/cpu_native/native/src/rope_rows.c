/* The rotation (Su et al. 2021, eq. 34) of every head's row:
 *
 *   y1 = x1 cos - sign x2 sin;  y2 = x2 cos + sign x1 sin
 *
 * x1, x2: the two places of a pair, n apart (halves) or side by side (interleaved); sign -1 undoes it. What is behind the
 * 2n places that cos and sin have is copied. float32 inside, one rounding a result. Rows are (batch, head, token), each
 * with a stride of its own; cos and sin [B or 1, T, 2n] lie in rows.
 */
#include "rows.h"

#define PAIR(T, C, a, b)                                                                                               \
    {                                                                                                                  \
        const float x1 = get_##T(x[a]), x2 = get_##T(x[b]);                                                            \
        const float s1 = sign * get_##C(sin[a]), s2 = sign * get_##C(sin[b]);                                          \
        const float c1 = get_##C(cos[a]), c2 = get_##C(cos[b]);                                                        \
        y[a] = put_##T(x1 * c1 - x2 * s1);                                                                             \
        y[b] = put_##T(x2 * c2 + x1 * s2);                                                                             \
    }

#define DEFINE_ROPE(T, C)                                                                                              \
    KERNEL smedjan_rope_##T##_##C(const step *s, int rank, int threads)                                                \
    {                                                                                                                  \
        const int64_t batch = s->number[0], heads = s->number[1], tokens = s->number[2], width = s->number[3];         \
        const int64_t dim = s->number[4], half = dim / 2, interleaved = s->number[11] & 1;                             \
        const int64_t shared = s->number[11] & 2;                                                                      \
        const float sign = s->real[0];                                                                                 \
        FOR_ROWS(batch * tokens * heads)                                                                               \
        {                                                                                                              \
            const int64_t head = row % heads, token = row / heads % tokens, b = row / heads / tokens;                  \
            const T##_t *x =                                                                                           \
                (const T##_t *)s->array[0] + b * s->number[5] + head * s->number[6] + token * s->number[7];            \
            T##_t *y = (T##_t *)s->array[3] + b * s->number[8] + head * s->number[9] + token * s->number[10];          \
            const int64_t place = ((shared ? 0 : b) * tokens + token) * dim;                                           \
            const C##_t *cos = (const C##_t *)s->array[1] + place, *sin = (const C##_t *)s->array[2] + place;          \
            if (interleaved) {                                                                                         \
                EACH_ELEMENT                                                                                           \
                for (int64_t i = 0; i < half; i++)                                                                     \
                    PAIR(T, C, 2 * i, 2 * i + 1)                                                                       \
            } else {                                                                                                   \
                EACH_ELEMENT                                                                                           \
                for (int64_t i = 0; i < half; i++)                                                                     \
                    PAIR(T, C, i, i + half)                                                                            \
            }                                                                                                          \
            for (int64_t i = dim; i < width; i++)                                                                      \
                y[i] = x[i];                                                                                           \
        }                                                                                                              \
    }

DEFINE_ROPE(float32, float32)
DEFINE_ROPE(bfloat16, float32)
DEFINE_ROPE(bfloat16, bfloat16)
