/* y[r] = table[index[r]], rows of `bytes` bytes each: `embedding` and `take_rows`. */
#include "tape.h"
#include "scalar.h"

#include <string.h>

/* arrays: table, index (int64), y.  numbers: rows, bytes of a row */
void gather_rows(const step *s, int rank, int threads)
{
    const char *table = s->array[0];
    const int64_t *index = s->array[1];
    char *y = s->array[2];
    const int64_t rows = s->number[0], bytes = s->number[1];
    int64_t from, to;
    share(rows * bytes, 4096, rank, threads, &from, &to);
    for (int64_t at = from; at < to;) {
        const int64_t row = at / bytes, start = at % bytes;
        const int64_t size = (bytes - start < to - at) ? bytes - start : to - at;
        memcpy(y + at, table + index[row] * bytes + start, size);
        at += size;
    }
}

/* y[r, i] = codes[index[r], i] * scale[index[r]], in float32, rounded once.
 * arrays: codes (int8), scale (float32), index (int64), y.  numbers: rows, columns */
#define DEFINE_INT8_GATHER(act)                                                                                        \
    void int8_gather_##act(const step *s, int rank, int threads)                                                       \
    {                                                                                                                  \
        const int8_t *codes = s->array[0];                                                                             \
        const float *scale = s->array[1];                                                                              \
        const int64_t *index = s->array[2], columns = s->number[1];                                                    \
        act##_t *y = s->array[3];                                                                                      \
        int64_t from, to;                                                                                              \
        share(s->number[0], 1, rank, threads, &from, &to);                                                             \
        for (int64_t row = from; row < to; row++)                                                                      \
            for (int64_t i = 0; i < columns; i++)                                                                      \
                y[row * columns + i] = put_##act((float)codes[index[row] * columns + i] * scale[index[row]]);          \
    }

DEFINE_INT8_GATHER(float32)
DEFINE_INT8_GATHER(bfloat16)
