/* y = x W^T + b for one row x: a weight is read once from memory, which is what bounds it.
 *
 * Up to four weights of one input stand in one step (q, k and v; gate and up), and y has their outputs one behind
 * another. Products and sums are float32; x and y are rounded to their dtype; int8 codes are widened one by one and a
 * row's sum is multiplied by its scale, which is the product with codes * scale but for one rounding.
 */
#include "tape.h"
#include "vector.h"

DEFINE_DOT(float32)
DEFINE_DOT(bfloat16)
DEFINE_DOT(int8)

/* arrays: x, y, W_i at 2 + i, b_i at 6 + i (or NULL), scale_i at 10 + i (float32; int8 alone)
 * numbers: columns, weights, O_i at 2 + i */
#define DEFINE_LINEAR(name, act, type, SCALE)                                                                          \
    void name(const step *s, int rank, int threads)                                                                    \
    {                                                                                                                  \
        const act##_t *x = s->array[0];                                                                                \
        act##_t *y = s->array[1];                                                                                      \
        const int64_t columns = s->number[0], weights = s->number[1];                                                  \
        int64_t width = 0, from, to;                                                                                   \
        for (int64_t i = 0; i < weights; i++)                                                                          \
            width += s->number[2 + i];                                                                                 \
        share(width, 1, rank, threads, &from, &to);                                                                    \
        float wide[columns];                                                                                           \
        for (int64_t i = 0; i < columns; i++)                                                                          \
            wide[i] = get_##act(x[i]);                                                                                 \
        for (int64_t i = 0, start = 0; i < weights; start += s->number[2 + i++]) {                                     \
            const int64_t size = s->number[2 + i];                                                                     \
            const type##_t *w = s->array[2 + i];                                                                       \
            const act##_t *bias = s->array[6 + i];                                                                     \
            const float *scale = s->array[10 + i];                                                                     \
            (void)scale;                                                                                               \
            const int64_t first = from > start ? from - start : 0, last = to - start < size ? to - start : size;       \
            for (int64_t o = first; o < last; o++) {                                                                   \
                const float sum = dot_##type(wide, w + o * columns, columns) SCALE;                                    \
                y[start + o] = put_##act(bias ? sum + get_##act(bias[o]) : sum);                                       \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_LINEAR(linear_float32, float32, float32, )
DEFINE_LINEAR(linear_bfloat16, bfloat16, bfloat16, )
DEFINE_LINEAR(int8_linear_float32, float32, int8, * scale[o])
DEFINE_LINEAR(int8_linear_bfloat16, bfloat16, int8, * scale[o])
