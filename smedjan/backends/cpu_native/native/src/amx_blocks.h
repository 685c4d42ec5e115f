/* What products of bfloat16 and of float32 on AMX share: blocks of 32 x 32 sums, and how they leave the tiles. */
#ifndef SMEDJAN_AMX_BLOCKS_H
#define SMEDJAN_AMX_BLOCKS_H

#include "amx.h"
#include "rows.h"

#include <stddef.h>

#if TILES
#define BLOCK 32 /* rows, columns */

/* out = sums + plus. A plus_pitch of 0 is one row for all. */
#define DEFINE_WRITE(T)                                                                                                \
    static inline void write_##T(const float *sums, const T##_t *plus, int64_t plus_pitch, T##_t *out, int64_t pitch,  \
                                 int64_t rows, int64_t columns)                                                        \
    {                                                                                                                  \
        for (int64_t i = 0; i < rows; i++, sums += BLOCK, out += pitch) {                                              \
            if (plus != NULL) {                                                                                        \
                EACH_ELEMENT for (int64_t j = 0; j < columns; j++) out[j] = put_##T(sums[j] + get_##T(plus[j]));       \
                plus += plus_pitch;                                                                                    \
            } else {                                                                                                   \
                EACH_ELEMENT for (int64_t j = 0; j < columns; j++) out[j] = put_##T(sums[j]);                          \
            }                                                                                                          \
        }                                                                                                              \
    }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The largest divisor of `threads` that leaves no thread without one of the `units`. */
static inline int fitting(int threads, int64_t units)
{
    int most = 1;
    for (int each = 1; each <= threads; each++)
        if (threads % each == 0 && each <= units)
            most = each;
    return most;
}
#endif

#endif
