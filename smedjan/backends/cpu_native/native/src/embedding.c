/* y[r] = table[index[r]], rows of `bytes` bytes each: `embedding` and `take_rows`. */
#include "tape.h"

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
