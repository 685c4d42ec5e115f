/* What products on AMX's tiles share (amx_product.c, amx_float32.c): operands are put in tiles as TDPBF16PS wants them, a
 * row of a as it is, b with its rows in pairs, [depth / 2, n, 2]; sums leave them.
 */
#ifndef SMEDJAN_AMX_OPERANDS_H
#define SMEDJAN_AMX_OPERANDS_H

#include "amx.h"
#include "rows.h"

#include <stddef.h>

#if TILES
#define BLOCK 32 /* rows, columns */

#if TILES == 2
/* r[i][j] -> r[j][i], 16 x 16 of 32 bits */
static inline void transpose(__m512i *r)
{
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

static inline __mmask32 first(int64_t count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0; }

/* 16 rows of 32 numbers, of which `rows` and `wide` are there, the others 0 */
static inline void read_rows(__m512i *r, const bf16 *x, int64_t pitch, int64_t rows, int64_t wide)
{
    const __mmask32 keep = first(wide);
    for (int i = 0; i < TILE; i++)
        r[i] = i < rows ? _mm512_maskz_loadu_epi16(keep, x + i * pitch) : _mm512_setzero_si512();
}

static inline void write_tile(bf16 *to, const __m512i *r)
{
    for (int i = 0; i < TILE; i++)
        _mm512_storeu_si512(to + DEPTH * i, r[i]);
}

/* Rows 2 i and 2 i + 1 of 32 columns in pairs: low[i] has columns 0 to 15, high[i] the others. */
static inline void read_pairs(__m512i *low, __m512i *high, const bf16 *x, int64_t pitch, int64_t rows, int64_t wide)
{
    const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    const __mmask32 keep = first(wide);
    for (int i = 0; i < TILE; i++) {
        const bf16 *row = x + 2 * i * pitch;
        const __m512i even = 2 * i < rows ? _mm512_maskz_loadu_epi16(keep, row) : _mm512_setzero_si512();
        const __m512i odd = 2 * i + 1 < rows ? _mm512_maskz_loadu_epi16(keep, row + pitch) : _mm512_setzero_si512();
        low[i] = _mm512_permutex2var_epi16(even, lower, odd);
        high[i] = _mm512_permutex2var_epi16(even, upper, odd);
    }
}

/* 32 lines along the depth, as they are: two tiles of 16 lines */
static inline void put_lines(bf16 *to, const bf16 *x, int64_t pitch, int64_t lines, int64_t depth, int turned)
{
    for (int half = 0; half < 2; half++) {
        __m512i r[16];
        read_rows(r, x + half * TILE * pitch, pitch, lines - half * TILE, depth);
        if (turned)
            transpose(r);
        write_tile(to + half * TILE_SIZE, r);
    }
}

/* 32 lines across the depth, which is rows here */
static inline void put_across(bf16 *to, const bf16 *x, int64_t pitch, int64_t lines, int64_t depth, int turned)
{
    __m512i low[16], high[16];
    read_pairs(low, high, x, pitch, depth, lines);
    if (turned) {
        transpose(low);
        transpose(high);
    }
    write_tile(to, low);
    write_tile(to + TILE_SIZE, high);
}
#else
static inline void put_lines(bf16 *to, const bf16 *x, int64_t pitch, int64_t lines, int64_t depth, int turned)
{
    for (int64_t i = 0; i < BLOCK; i++)
        for (int64_t k = 0; k < DEPTH; k++) {
            const bf16 each = i < lines && k < depth ? x[i * pitch + k] : (bf16){0};
            const int64_t line = i % TILE;
            to[i / TILE * TILE_SIZE + (turned ? k / 2 * DEPTH + 2 * line + k % 2 : line * DEPTH + k)] = each;
        }
}

static inline void put_across(bf16 *to, const bf16 *x, int64_t pitch, int64_t lines, int64_t depth, int turned)
{
    for (int64_t i = 0; i < BLOCK; i++)
        for (int64_t k = 0; k < DEPTH; k++) {
            const bf16 each = i < lines && k < depth ? x[k * pitch + i] : (bf16){0};
            const int64_t line = i % TILE;
            to[i / TILE * TILE_SIZE + (turned ? line * DEPTH + k : k / 2 * DEPTH + 2 * line + k % 2)] = each;
        }
}
#endif

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
