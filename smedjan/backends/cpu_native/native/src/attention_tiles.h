/* Tiles of attention: 64 queries by 64 keys, float32 in scratch of a thread's own that its L1 and L2 caches hold.
 *
 * Scores lie transposed, [key][query]: sixteen queries are the lanes of a vector, so that no maximum and no sum of the
 * softmax goes across lanes. Products run on blocks of eight rows; which blocks of eight keys by eight queries anybody
 * sees is a bit each: byte k of a `bits` is of eight keys, its bit q of eight queries. What nobody sees is not computed.
 */
#ifndef SMEDJAN_ATTENTION_TILES_H
#define SMEDJAN_ATTENTION_TILES_H

#include "rows.h"

#include <float.h>

#define TILE 64
#define BLOCK 8
#define BLOCKS (TILE / BLOCK)
#define STRIPS (TILE / LANES)

/* Rows and vectors of a product that are in registers at once. */
#if defined(__AVX512F__) && !defined(SMEDJAN_PORTABLE)
#define TALL 8
#define WIDE 2
#else
#define TALL 4
#define WIDE 1
#endif

/* [rows][pitch]: keys, values, queries, dy, y (or dq), and the totals of dk and dv, which may have more rows than a tile.
 * [dim][TILE]: queries_t, dy_t. [key][query]: p, ds, and there, of bytes. [TILE]: the others, a number a query. */
typedef struct {
    float *keys, *values, *queries, *dy, *y, *dk, *dv, *queries_t, *dy_t, *p, *ds, *high, *sum, *alpha;
    int8_t *there;
    int64_t dim, pitch;
} tiles;

/* An array [batch, head, row, dim]: its address and strides in bytes. `narrow`: of bfloat16. */
typedef struct {
    char *at;
    int64_t batch, head, row;
    int narrow;
} view;

ALWAYS void *place(view x, int64_t batch, int64_t head, int64_t row)
{
    return x.at + batch * x.batch + head * x.head + row * x.row;
}

ALWAYS int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
ALWAYS int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Rows of `dim` numbers, to whole vectors; not of a multiple of 512 bytes, which would share a few sets of L1. */
ALWAYS int64_t pitch_of(int64_t dim)
{
    const int64_t whole = up(dim, LANES);
    return whole % 128 ? whole : whole + LANES;
}

ALWAYS float *take(float *scratch, int64_t *taken, int64_t count)
{
    float *found = scratch ? scratch + *taken : NULL;
    *taken += up(count, LANES);
    return found;
}

/* Divides a thread's scratch, and gives the floats that it takes: of NULL too. `totals`: rows of dk and dv, 0 in a
 * forward pass. */
ALWAYS int64_t lay_out(tiles *t, float *scratch, int64_t dim, int64_t totals)
{
    int64_t taken = 0;
    const int64_t pitch = pitch_of(dim), rows = TILE * pitch, columns = up(dim, LANES) * TILE;
    t->dim = dim;
    t->pitch = pitch;
    t->keys = take(scratch, &taken, rows);
    t->values = take(scratch, &taken, rows);
    t->queries = take(scratch, &taken, rows);
    t->y = take(scratch, &taken, rows);
    t->queries_t = take(scratch, &taken, columns);
    t->p = take(scratch, &taken, TILE * TILE);
    t->high = take(scratch, &taken, TILE);
    t->sum = take(scratch, &taken, TILE);
    t->alpha = take(scratch, &taken, TILE);
    t->there = (int8_t *)take(scratch, &taken, TILE * TILE / (int64_t)sizeof(float));
    if (totals) {
        t->dy = take(scratch, &taken, rows);
        t->dy_t = take(scratch, &taken, columns);
        t->ds = take(scratch, &taken, TILE * TILE);
        t->dk = take(scratch, &taken, totals * pitch);
        t->dv = take(scratch, &taken, totals * pitch);
    }
    return taken;
}

/* c[m][n] = f[m] c[m][n] + sum over k of a[m am + k ak] b[k bk + n]: BLOCK rows, `vectors` times sixteen columns. Without
 * `f`, c is only written. What is in c is added last: a total of many tiles is rounded once for each. */
ALWAYS void some(int wide, const float *a, int64_t am, int64_t ak, const float *b, int64_t bk, int64_t count, float *c,
                 int64_t cm, const float *f)
{
    vf sum[TALL][WIDE];
#pragma GCC unroll 8
    for (int m = 0; m < TALL; m++)
#pragma GCC unroll 2
        for (int n = 0; n < wide; n++)
            sum[m][n] = splat(0);
    for (int64_t k = 0; k < count; k++) {
        vf each[WIDE];
#pragma GCC unroll 2
        for (int n = 0; n < wide; n++)
            each[n] = load_float32(b + k * bk + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < TALL; m++) {
            const vf x = splat(a[m * am + k * ak]);
#pragma GCC unroll 2
            for (int n = 0; n < wide; n++)
                sum[m][n] = fma16(x, each[n], sum[m][n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < TALL; m++)
#pragma GCC unroll 2
        for (int n = 0; n < wide; n++) {
            float *to = c + m * cm + n * LANES;
            store_float32(to, f ? fma16(splat(f[m]), load_float32(to), sum[m][n]) : sum[m][n]);
        }
}

ALWAYS void product(const float *a, int64_t am, int64_t ak, const float *b, int64_t bk, int64_t count, int64_t vectors,
                    float *c, int64_t cm, const float *f)
{
    for (int m = 0; m < BLOCK; m += TALL, a += TALL * am, c += TALL * cm, f = f ? f + TALL : f) {
        int64_t n = 0;
        for (; n + WIDE <= vectors; n += WIDE)
            some(WIDE, a, am, ak, b + n * LANES, bk, count, c + n * LANES, cm, f);
        for (; n < vectors; n++)
            some(1, a, am, ak, b + n * LANES, bk, count, c + n * LANES, cm, f);
    }
}

/* The first and the last but one of the bits that are set. */
ALWAYS void hull(unsigned bits, int *from, int *to)
{
    *from = 0;
    *to = BLOCKS;
    while (*from < BLOCKS && !(bits >> *from & 1))
        ++*from;
    while (*to > *from && !(bits >> (*to - 1) & 1))
        --*to;
}

ALWAYS unsigned of_keys(uint64_t bits, int block) { return (unsigned)(bits >> (BLOCKS * block)) & 0xff; }
ALWAYS unsigned of_queries(uint64_t bits, int block)
{
    unsigned found = 0;
    for (int k = 0; k < BLOCKS; k++)
        found |= (of_keys(bits, k) >> block & 1) << k;
    return found;
}

/* s[key][query] = sum over dim of x[key] y_t[query], of blocks that somebody sees, to whole strips. */
static void scores(const tiles *t, uint64_t bits, const float *x, const float *y_t, float *s)
{
    for (int k = 0; k < BLOCKS; k++) {
        int from, to;
        hull(of_keys(bits, k), &from, &to);
        const int64_t strip = from / 2, vectors = (to + 1) / 2 - strip;
        if (from < to)
            product(x + k * BLOCK * t->pitch, t->pitch, 1, y_t + strip * LANES, TILE, t->dim, vectors,
                    s + k * BLOCK * TILE + strip * LANES, TILE, NULL);
    }
}

/* y[query] = f[query] y[query] + sum over keys of p[key][query] x[key] */
static void add_to_queries(const tiles *t, uint64_t bits, const float *p, const float *x, float *y, const float *f)
{
    for (int q = 0; q < BLOCKS; q++) {
        int from, to;
        hull(of_queries(bits, q), &from, &to);
        if (from < to)
            product(p + from * BLOCK * TILE + q * BLOCK, 1, TILE, x + from * BLOCK * t->pitch, t->pitch,
                    (to - from) * BLOCK, up(t->dim, LANES) / LANES, y + q * BLOCK * t->pitch, t->pitch,
                    f + q * BLOCK);
    }
}

/* y[key] += sum over queries of p[key][query] x[query] */
static void add_to_keys(const tiles *t, uint64_t bits, const float *p, const float *x, float *y)
{
    static const float ones[BLOCK] = {1, 1, 1, 1, 1, 1, 1, 1};
    for (int k = 0; k < BLOCKS; k++) {
        int from, to;
        hull(of_keys(bits, k), &from, &to);
        if (from < to)
            product(p + k * BLOCK * TILE + from * BLOCK, TILE, 1, x + from * BLOCK * t->pitch, t->pitch,
                    (to - from) * BLOCK, up(t->dim, LANES) / LANES, y + k * BLOCK * t->pitch, t->pitch, ones);
    }
}

/* Of `count` tiles the `i`th to do: the last, the first, the last but one, ... so that with a causal mask all shares of
 * neighbours are of about one size. */
ALWAYS int64_t in_turns(int64_t i, int64_t count) { return i % 2 ? i / 2 : count - 1 - i / 2; }

/* Rows of an array as a tile: zeros behind the last column, and behind the last row to a whole strip. */
static void load_tile(const tiles *t, view x, int64_t batch, int64_t head, int64_t first, int64_t rows, float *tile)
{
    const int64_t dim = t->dim, whole = up(dim, LANES);
    for (int64_t r = 0; r < rows; r++) {
        const void *from = place(x, batch, head, first + r);
        float *to = tile + r * t->pitch;
        int64_t i = 0;
        if (x.narrow) {
            for (; i + LANES <= dim; i += LANES)
                store_float32(to + i, load_bfloat16((const bf16 *)from + i));
            for (; i < dim; i++)
                to[i] = widen(((const bf16 *)from)[i]);
        } else {
            for (; i + LANES <= dim; i += LANES)
                store_float32(to + i, load_float32((const float *)from + i));
            for (; i < dim; i++)
                to[i] = ((const float *)from)[i];
        }
        for (; i < whole; i++)
            to[i] = 0;
    }
    for (int64_t r = rows; r < up(rows, LANES); r++)
        memset(tile + r * t->pitch, 0, whole * sizeof(float));
}

/* x[row] = factor tile[row] (or factor tile[row] / by[row]), rounded once. An x that nobody wants is NULL. */
static void store_tile(const tiles *t, const float *tile, view x, int64_t batch, int64_t head, int64_t first,
                       int64_t rows, float factor, const float *by)
{
    if (!x.at)
        return;
    for (int64_t r = 0; r < rows; r++) {
        void *to = place(x, batch, head, first + r);
        const float *from = tile + r * t->pitch, each = by ? factor / by[r] : factor;
        int64_t i = 0;
        if (x.narrow) {
            for (; i + LANES <= t->dim; i += LANES)
                store_bfloat16((bf16 *)to + i, mul16(load_float32(from + i), splat(each)));
            for (; i < t->dim; i++)
                ((bf16 *)to)[i] = narrow(from[i] * each);
        } else {
            for (; i + LANES <= t->dim; i += LANES)
                store_float32((float *)to + i, mul16(load_float32(from + i), splat(each)));
            for (; i < t->dim; i++)
                ((float *)to)[i] = from[i] * each;
        }
    }
}

/* y[i][q] = factor x[q][i], of whole strips of rows. */
static void transpose(const tiles *t, const float *x, int64_t rows, float factor, float *y)
{
    for (int64_t q = 0; q < rows; q += LANES)
        for (int64_t i = 0; i < t->dim; i += LANES)
            transpose16(x + q * t->pitch + i, t->pitch, factor, y + i * TILE + q, TILE);
}

/* What the mask says of a block: 0 nothing is seen, 2 everything, 1 a part. */
ALWAYS int seen(const int8_t *mask, int64_t stride, int64_t queries, int64_t keys)
{
    int any = 0, all = 1;
    for (int64_t i = 0; i < queries; i++, mask += stride)
        if (keys == BLOCK) {
            uint64_t word;
            memcpy(&word, mask, 8);
            any |= word != 0;
            all &= word == 0x0101010101010101u;
        } else
            for (int64_t j = 0; j < keys; j++) {
                any |= mask[j] != 0;
                all &= mask[j] != 0;
            }
    return any + (any && all);
}

/* The bits of a tile whose first query and key are (q, k). Where its blocks do not say all, `mixed`, t->there has each
 * query and key. `mask`: that of query 0 and key 0, or NULL. */
static uint64_t visible(const tiles *t, const int8_t *mask, int64_t stride, int causal, int64_t q, int64_t k,
                        int64_t queries, int64_t keys, int *mixed)
{
    uint64_t bits = 0;
    *mixed = keys % BLOCK != 0;
    for (int64_t j = 0; j < keys; j += BLOCK)
        for (int64_t i = 0; i < queries; i += BLOCK) {
            int how = 2;
            if (mask)
                how = seen(mask + (q + i) * stride + k + j, stride, least(BLOCK, queries - i), least(BLOCK, keys - j));
            if (causal && how && k + j + BLOCK - 1 > q + i)
                how = k + j <= q + i + BLOCK - 1;
            *mixed |= how == 1;
            bits |= (uint64_t)(how != 0) << (j + i / BLOCK);
        }
    if (!bits || !*mixed)
        return bits;
    for (int64_t j = 0; j < TILE; j++) {
        int8_t *row = t->there + j * TILE;
        const int64_t first = causal && k + j > q ? k + j - q : 0;
        memset(row, j < keys, TILE);
        memset(row, 0, least(first, TILE));
    }
    if (!mask)
        return bits;
    for (int64_t i = 0; i < queries; i++)
        for (int64_t j = 0; j < keys; j++)
            t->there[j * TILE + i] &= mask[(q + i) * stride + k + j] != 0;
    return bits;
}

#endif
