/* Products with a narrow side, as low-rank adapters have them: rows of many columns by a matrix of a few, a sum with rows
 * that are there, and what two arrays have in common over all rows.
 *
 *   reduce   low = f x P              x [M, K] of either dtype, P [K, R] -> low [M, R]
 *   expand   y = y + f low P          low [M, R], P [R, N] -> y [M, N] of either dtype, one rounding
 *   outer    out = f g^T x            g [M, R], x [M, K] of either dtype -> out [R, K], of any strides
 *
 * All else is float32, and so are all sums. Tiles of rows by vectors stay in registers; what is small is packed on the
 * stack: blocks of P or g, which every rank packs for itself, and the last rows and columns.
 */
#include "rows.h"

#define DEEPEST 256       /* the most that R is */
#define PACKED 32768      /* floats of a packed block: 128 KB */
#define STRIP 64          /* columns that are packed at a time for `expand` */
#define BLOCK 96          /* rows that then are taken to them: a multiple of every tile's */
#define REDUCED 256       /* columns of x that `reduce` widens at a time */
#define SPAN 192          /* columns whose sums `outer` keeps */
#define ROWS_OF_OUTER 64  /* and the rows that are read for them in one go, from the second time on in the L1 */

#if defined(__AVX512F__) && !defined(SMEDJAN_PORTABLE)
#define WIDEST 4 /* vectors of a tile: up to 24 sums in 32 registers */
#define OUTER_HEIGHT 8
#define OUTER_WIDTH 3
#else
#define WIDEST 1 /* six sums of two or four registers each */
#define OUTER_HEIGHT 6
#define OUTER_WIDTH 1
#endif
#define TALLEST 16

/* out [H, 16 W] = (or, with `more`, +=) sum over i < depth of a[r * by_row + i * by_depth] p[i * pitch + column] */
#define DEFINE_TILE(T, H, W)                                                                                           \
    ALWAYS void tile_##T##_##H##x##W(const float *a, int64_t by_row, int64_t by_depth, const T##_t *p, int64_t pitch,  \
                                     int64_t depth, float *out, int64_t out_pitch, int more)                           \
    {                                                                                                                  \
        vf total[H][W];                                                                                                \
        _Pragma("GCC unroll 16") for (int r = 0; r < H; r++)                                                           \
            _Pragma("GCC unroll 4") for (int v = 0; v < W; v++)                                                        \
                total[r][v] = more ? load_float32(out + r * out_pitch + v * LANES) : splat(0);                         \
        for (int64_t i = 0; i < depth; i++, a += by_depth, p += pitch) {                                               \
            vf w[W];                                                                                                   \
            _Pragma("GCC unroll 4") for (int v = 0; v < W; v++)                                                        \
                w[v] = load_##T(p + v * LANES);                                                                        \
            _Pragma("GCC unroll 16") for (int r = 0; r < H; r++) {                                                     \
                const vf each = splat(a[r * by_row]);                                                                  \
                _Pragma("GCC unroll 4") for (int v = 0; v < W; v++)                                                    \
                    total[r][v] = fma16(each, w[v], total[r][v]);                                                      \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 16") for (int r = 0; r < H; r++)                                                           \
            _Pragma("GCC unroll 4") for (int v = 0; v < W; v++)                                                        \
                store_float32(out + r * out_pitch + v * LANES, total[r][v]);                                           \
    }

#if WIDEST > 1
DEFINE_TILE(float32, 16, 1)
DEFINE_TILE(float32, 12, 2)
DEFINE_TILE(float32, 8, 3)
DEFINE_TILE(float32, 6, 4)
DEFINE_TILE(float32, 8, 1)
DEFINE_TILE(float32, 8, 2)
DEFINE_TILE(bfloat16, 8, 1)
DEFINE_TILE(bfloat16, 8, 2)
DEFINE_TILE(bfloat16, 8, 3)
#define FOR_WIDTH(width, DO)                                                                                           \
    switch (width) {                                                                                                   \
    case 1: DO(16, 1) break;                                                                                           \
    case 2: DO(12, 2) break;                                                                                           \
    case 3: DO(8, 3) break;                                                                                            \
    default: DO(6, 4) break;                                                                                           \
    }
#define OUTER_TILE(T, width, ...)                                                                                      \
    switch (width) {                                                                                                   \
    case 1: tile_##T##_8x1(__VA_ARGS__); break;                                                                        \
    case 2: tile_##T##_8x2(__VA_ARGS__); break;                                                                        \
    default: tile_##T##_8x3(__VA_ARGS__); break;                                                                       \
    }
#else
DEFINE_TILE(float32, 6, 1)
DEFINE_TILE(bfloat16, 6, 1)
#define FOR_WIDTH(width, DO) { DO(6, 1) }
#define OUTER_TILE(T, width, ...) tile_##T##_6x1(__VA_ARGS__);
#endif

ALWAYS int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

/* panel [depth, pitch] = p, whose strides are given, `count` columns of it and zeros behind them. */
static void pack(float *panel, int64_t pitch, const float *p, int64_t depth, int64_t count, int64_t by_depth,
                 int64_t by_column)
{
    if (by_column == 1)
        for (int64_t i = 0; i < depth; i++)
            memcpy(panel + i * pitch, p + i * by_depth, 4 * count);
    else
        for (int64_t first = 0; first < count; first += LANES) {
            const int64_t here = least(LANES, count - first);
            for (int64_t i = 0; i < depth; i++)
                for (int64_t c = first; c < first + here; c++)
                    panel[i * pitch + c] = p[i * by_depth + c * by_column];
        }
    if (count < pitch)
        for (int64_t i = 0; i < depth; i++)
            memset(panel + i * pitch + count, 0, 4 * (pitch - count));
}

/* rows [count, pitch] = x, `width` columns of it, in float32; zeros behind them. */
#define DEFINE_WIDEN(T)                                                                                                \
    ALWAYS void widen_##T(float *rows, int64_t pitch, const T##_t *x, int64_t stride, int64_t count, int64_t width)    \
    {                                                                                                                  \
        for (int64_t r = 0; r < count; r++) {                                                                          \
            float *row = rows + r * pitch;                                                                             \
            const T##_t *from = x + r * stride;                                                                        \
            int64_t i = 0;                                                                                             \
            for (; i + LANES <= width; i += LANES)                                                                     \
                store_float32(row + i, load_##T(from + i));                                                            \
            for (; i < width; i++)                                                                                     \
                row[i] = get_##T(from[i]);                                                                             \
        }                                                                                                              \
    }
DEFINE_WIDEN(float32)
DEFINE_WIDEN(bfloat16)

/* Rows of x to `here` columns of low, the first `depth` of x; the tile's last rows may be none. A copy of float32 pays
 * where few sums read x: the tile has one address, and the caches rows in order. */
#define REDUCE(T, H, W)                                                                                                \
    for (int64_t row = from; row < to; row += H) {                                                                     \
        const int64_t count = least(H, to - row);                                                                      \
        for (int64_t k = 0; k < depth || k == 0; k += REDUCED) {                                                       \
            const int64_t taken = least(REDUCED, depth - k);                                                           \
            const T##_t *rows = x + row * stride + first + k;                                                          \
            const float *p_here = panel + k * pitch + column;                                                          \
            if (sizeof *x == 4 && W > 1 && count == H)                                                                 \
                tile_float32_##H##x##W((const float *)(const void *)rows, stride, 1, p_here, pitch, taken, found,      \
                                       W * LANES, k > 0);                                                              \
            else {                                                                                                     \
                widen_##T(wide, REDUCED, rows, stride, count, taken);                                                  \
                tile_float32_##H##x##W(wide, REDUCED, 1, p_here, pitch, taken, found, W * LANES, k > 0);               \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t r = 0; r < count; r++) {                                                                          \
            float *out = low + (row + r) * low_stride + column;                                                        \
            const float *made = found + r * W * LANES;                                                                 \
            if (first)                                                                                                 \
                for (int64_t c = 0; c < here; c++)                                                                     \
                    out[c] += factor * made[c];                                                                        \
            else                                                                                                       \
                for (int64_t c = 0; c < here; c++)                                                                     \
                    out[c] = factor * made[c];                                                                         \
        }                                                                                                              \
    }

#define REDUCE_float32(H, W) REDUCE(float32, H, W)
#define REDUCE_bfloat16(H, W) REDUCE(bfloat16, H, W)

/* arrays: x, P, low.  numbers: M, K, R, strides of x's rows, of P's rows and columns, of low's rows.  reals: f */
#define DEFINE_REDUCE(T)                                                                                               \
    KERNEL smedjan_narrow_reduce_##T(const step *s, int rank, int threads)                                             \
    {                                                                                                                  \
        const T##_t *x = s->array[0];                                                                                  \
        const float *p = s->array[1], factor = s->real[0];                                                             \
        float *low = s->array[2];                                                                                      \
        const int64_t width = s->number[1], columns = s->number[2], stride = s->number[3], low_stride = s->number[6];  \
        const int64_t pitch = up(columns, LANES), deep = PACKED / pitch;                                               \
        float panel[PACKED], wide[TALLEST * REDUCED], found[TALLEST * LANES + 8 * WIDEST * LANES];                     \
        int64_t from, to;                                                                                              \
        share(s->number[0], TALLEST, rank, threads, &from, &to);                                                       \
        if (from == to)                                                                                                \
            return;                                                                                                    \
        memset(wide, 0, sizeof wide);                                                                                  \
        for (int64_t first = 0; first < width || first == 0; first += deep) {                                          \
            const int64_t depth = least(deep, width - first);                                                          \
            pack(panel, pitch, p + first * s->number[4], depth, columns, s->number[4], s->number[5]);                  \
            for (int64_t column = 0; column < columns; column += WIDEST * LANES) {                                     \
                const int64_t here = least(WIDEST * LANES, columns - column);                                          \
                FOR_WIDTH((here + LANES - 1) / LANES, REDUCE_##T)                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_REDUCE(float32)
DEFINE_REDUCE(bfloat16)

#define EXPAND(T, H, W)                                                                                                \
    for (int64_t row = top; row < end; row += H) {                                                                     \
        const int64_t count = least(H, end - row);                                                                     \
        const float *a = low + row * low_stride;                                                                       \
        int64_t by_row = low_stride;                                                                                   \
        if (count < H) {                                                                                               \
            widen_float32(last, DEEPEST, a, low_stride, count, depth);                                                 \
            a = last, by_row = DEEPEST;                                                                                \
        }                                                                                                              \
        for (int64_t r = 0; r < count; r++) /* what the sums, when they are there, are added to */                     \
            for (int64_t v = 0; v < W; v++)                                                                            \
                PREFETCH(y + (row + r) * stride + first + column + v * LANES);                                         \
        tile_float32_##H##x##W(a, by_row, 1, panel + column, STRIP, depth, found, W * LANES, 0);                       \
        for (int64_t r = 0; r < count; r++) {                                                                          \
            T##_t *out = y + (row + r) * stride + first + column;                                                      \
            const float *made = found + r * W * LANES;                                                                 \
            if (here == W * LANES)                                                                                     \
                _Pragma("GCC unroll 4") for (int c = 0; c < W * LANES; c += LANES)                                     \
                    store_##T(out + c, fma16(splat(factor), load_float32(made + c), load_##T(out + c)));               \
            else                                                                                                       \
                for (int64_t c = 0; c < here; c++)                                                                     \
                    out[c] = put_##T(get_##T(out[c]) + factor * made[c]);                                              \
        }                                                                                                              \
    }
#define EXPAND_float32(H, W) EXPAND(float32, H, W)
#define EXPAND_bfloat16(H, W) EXPAND(bfloat16, H, W)

/* arrays: low, P, y.  numbers: M, R, N, strides of low's rows, of P's rows and columns, of y's rows.  reals: f */
#define DEFINE_EXPAND(T)                                                                                               \
    KERNEL smedjan_narrow_expand_##T(const step *s, int rank, int threads)                                             \
    {                                                                                                                  \
        const float *low = s->array[0], *p = s->array[1], factor = s->real[0];                                         \
        T##_t *y = s->array[2];                                                                                        \
        const int64_t rows = s->number[0], depth = s->number[1], columns = s->number[2], low_stride = s->number[3];    \
        const int64_t stride = s->number[6], blocks = (rows + BLOCK - 1) / BLOCK;                                      \
        float panel[DEEPEST * STRIP], last[TALLEST * DEEPEST], found[TALLEST * LANES + 8 * WIDEST * LANES];            \
        int64_t from, to, packed = -1;                                                                                 \
        memset(last, 0, sizeof last);                                                                                  \
        share(blocks * ((columns + STRIP - 1) / STRIP), 1, rank, threads, &from, &to);                                 \
        for (int64_t job = from; job < to; job++) {                                                                    \
            const int64_t first = job / blocks * STRIP, top = job % blocks * BLOCK, end = least(top + BLOCK, rows);    \
            const int64_t taken = least(STRIP, columns - first);                                                       \
            if (packed != first)                                                                                       \
                pack(panel, STRIP, p + first * s->number[5], depth, taken, s->number[4], s->number[5]);                \
            packed = first;                                                                                            \
            for (int64_t column = 0; column < taken; column += WIDEST * LANES) {                                       \
                const int64_t here = least(WIDEST * LANES, taken - column);                                            \
                FOR_WIDTH((here + LANES - 1) / LANES, EXPAND_##T)                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_EXPAND(float32)
DEFINE_EXPAND(bfloat16)

/* arrays: g, x, out.  numbers: M, R, K, strides of g's rows, of x's rows, of out's rows and columns.  reals: f */
#define DEFINE_OUTER(T)                                                                                                \
    KERNEL smedjan_narrow_outer_##T(const step *s, int rank, int threads)                                              \
    {                                                                                                                  \
        const float *g = s->array[0], factor = s->real[0];                                                             \
        const T##_t *x = s->array[1];                                                                                  \
        float *out = s->array[2];                                                                                      \
        const int64_t rows = s->number[0], narrow = s->number[1], columns = s->number[2], stride = s->number[4];       \
        const int64_t by_row = s->number[5], by_column = s->number[6], pitch = up(narrow, OUTER_HEIGHT);               \
        const int64_t high = least(ROWS_OF_OUTER, PACKED / pitch);                                                     \
        float panel[PACKED], sums[(DEEPEST + OUTER_HEIGHT) * SPAN], last[ROWS_OF_OUTER * LANES];                       \
        int64_t from, to;                                                                                              \
        share(columns, LANES, rank, threads, &from, &to);                                                              \
        for (int64_t first = from; first < to; first += SPAN) {                                                        \
            const int64_t taken = least(SPAN, to - first), whole = taken / LANES;                                      \
            for (int64_t top = 0; top < rows || top == 0; top += high) {                                               \
                const int64_t count = least(high, rows - top);                                                         \
                const T##_t *here = x + top * stride + first;                                                          \
                pack(panel, pitch, g + top * s->number[3], count, narrow, s->number[3], 1);                            \
                for (int64_t v = 0; v < whole; v += OUTER_WIDTH)                                                       \
                    for (int64_t r = 0; r < narrow; r += OUTER_HEIGHT)                                                 \
                        OUTER_TILE(T, least(OUTER_WIDTH, whole - v), panel + r, 1, pitch, here + v * LANES, stride,    \
                                   count, sums + r * SPAN + v * LANES, SPAN, top > 0)                                  \
                if (taken > whole * LANES) {                                                                           \
                    memset(last, 0, sizeof last);                                                                      \
                    widen_##T(last, LANES, here + whole * LANES, stride, count, taken - whole * LANES);                \
                    for (int64_t r = 0; r < narrow; r += OUTER_HEIGHT)                                                 \
                        OUTER_TILE(float32, 1, panel + r, 1, pitch, last, LANES, count,                                \
                                   sums + r * SPAN + whole * LANES, SPAN, top > 0)                                     \
                }                                                                                                      \
            }                                                                                                          \
            if (by_column == 1)                                                                                        \
                for (int64_t r = 0; r < narrow; r++)                                                                   \
                    for (int64_t c = 0; c < taken; c++)                                                                \
                        out[r * by_row + first + c] = factor * sums[r * SPAN + c];                                     \
            else                                                                                                       \
                for (int64_t c = 0; c < taken; c++)                                                                    \
                    for (int64_t r = 0; r < narrow; r++)                                                               \
                        out[r * by_row + (first + c) * by_column] = factor * sums[r * SPAN + c];                       \
        }                                                                                                              \
    }

DEFINE_OUTER(float32)
DEFINE_OUTER(bfloat16)
