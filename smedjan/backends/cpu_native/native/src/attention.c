/* Attention of one new token over a cache: y = softmax(scale q k^T) v, one query head a work item.
 *
 * Scores, softmax and sums are float32. Of a cache of S places the first `length` are filled, the token's own among
 * them; with a window w, the last w of these are seen.
 */
#include "tape.h"
#include "vector.h"

DEFINE_DOT(float32)
DEFINE_DOT(bfloat16)

/* cache[k, start] = kv[k].  arrays: cache, kv, start (int64).  numbers: heads, places, bytes of a head */
void kv_write(const step *s, int rank, int threads)
{
    const int64_t places = s->number[1], bytes = s->number[2], start = *(const int64_t *)s->array[2];
    int64_t from, to;
    share(s->number[0], 4, rank, threads, &from, &to);
    for (int64_t head = from; head < to; head++)
        memcpy((char *)s->array[0] + (head * places + start) * bytes, (const char *)s->array[1] + head * bytes, bytes);
}

/* y[i] = sum over j of p[j] v[j, i], 64 columns at a time in registers */
#define DEFINE_WEIGHTED(act)                                                                                           \
    ALWAYS void weighted_##act(const float *p, const act##_t *v, int64_t first, int64_t last, int64_t dim, float *y)   \
    {                                                                                                                  \
        int64_t i = 0;                                                                                                 \
        for (; i + 4 * LANES <= dim; i += 4 * LANES) {                                                                 \
            vf a = splat(0), b = splat(0), c = splat(0), d = splat(0);                                                 \
            for (int64_t j = first; j < last; j++) {                                                                   \
                const act##_t *row = v + j * dim + i;                                                                  \
                const vf each = splat(p[j]);                                                                           \
                a = fma16(each, load_##act(row), a);                                                                   \
                b = fma16(each, load_##act(row + LANES), b);                                                           \
                c = fma16(each, load_##act(row + 2 * LANES), c);                                                       \
                d = fma16(each, load_##act(row + 3 * LANES), d);                                                       \
            }                                                                                                          \
            store_float32(y + i, a);                                                                                   \
            store_float32(y + i + LANES, b);                                                                           \
            store_float32(y + i + 2 * LANES, c);                                                                       \
            store_float32(y + i + 3 * LANES, d);                                                                       \
        }                                                                                                              \
        for (; i < dim; i++) {                                                                                         \
            float sum = 0;                                                                                             \
            for (int64_t j = first; j < last; j++)                                                                     \
                sum += p[j] * get_##act(v[j * dim + i]);                                                               \
            y[i] = sum;                                                                                                \
        }                                                                                                              \
    }

/* arrays: q, k cache, v cache, length (int64), y, scores (float32 [q heads, places])
 * numbers: q heads, k heads, places, head dim, window (0: none).  reals: scale, cap (0: none) */
#define DEFINE_ATTENTION(act)                                                                                          \
    void cached_attention_##act(const step *s, int rank, int threads)                                                  \
    {                                                                                                                  \
        const int64_t heads = s->number[0], group = heads / s->number[1], places = s->number[2], dim = s->number[3];   \
        const int64_t length = *(const int64_t *)s->array[3], window = s->number[4];                                   \
        const int64_t first = window && length > window ? length - window : 0;                                         \
        const float scale = s->real[0], cap = s->real[1];                                                              \
        int64_t from, to;                                                                                              \
        share(heads, 1, rank, threads, &from, &to);                                                                    \
        float q[dim], y[dim];                                                                                          \
        for (int64_t head = from; head < to; head++) {                                                                 \
            const act##_t *k = (const act##_t *)s->array[1] + head / group * places * dim;                             \
            const act##_t *v = (const act##_t *)s->array[2] + head / group * places * dim;                             \
            float *score = (float *)s->array[5] + head * places;                                                       \
            for (int64_t i = 0; i < dim; i++)                                                                          \
                q[i] = get_##act(((const act##_t *)s->array[0])[head * dim + i]) * scale;                              \
            for (int64_t j = first; j < length; j++)                                                                   \
                score[j] = dot_##act(q, k + j * dim, dim);                                                             \
            if (cap != 0.0f)                                                                                           \
                for (int64_t j = first; j < length; j++)                                                               \
                    score[j] = cap * tanhf(score[j] / cap);                                                            \
            float largest = score[first], total = 0;                                                                   \
            LARGEST_OF(largest)                                                                                        \
            for (int64_t j = first; j < length; j++)                                                                   \
                largest = score[j] > largest ? score[j] : largest;                                                     \
            for (int64_t j = first; j < length; j++)                                                                   \
                score[j] = exp_fast(score[j] - largest);                                                               \
            SUM_OF(total)                                                                                              \
            for (int64_t j = first; j < length; j++)                                                                   \
                total += score[j];                                                                                     \
            weighted_##act(score, v, first, length, dim, y);                                                           \
            for (int64_t i = 0; i < dim; i++)                                                                          \
                ((act##_t *)s->array[4])[head * dim + i] = put_##act(y[i] / total);                                    \
        }                                                                                                              \
    }

DEFINE_WEIGHTED(float32)
DEFINE_WEIGHTED(bfloat16)
DEFINE_ATTENTION(float32)
DEFINE_ATTENTION(bfloat16)
