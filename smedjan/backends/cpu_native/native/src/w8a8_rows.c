/* y = x W^T + b of 8-bit integers: rows of x are coded, products of codes are summed in int32, which is exact in any
 * order, and a sum is scaled in float32 (ops/int8.py has the mathematics).
 *
 * The codes of W lie in panels of PANEL rows, for each four columns the four codes of every row: [O / PANEL] [K / 4]
 * [PANEL] [4], zeros behind both ends. One instruction then multiplies four codes of x, the same in every lane, with
 * four of each row's. By the CPU's instructions:
 *
 *   VNNI      vpdpbusd: unsigned by signed bytes. x is coded + 128, and 128 times a row of W's sum is taken off again
 *   AVX2      vpmaddubsw of |x| and of w with x's sign: two products of at most 127^2 fit in its 16 bits
 *   others    plain C
 */
#include "rows.h"

#define PANEL 32

#if defined(SMEDJAN_PORTABLE)
#elif defined(__AVX512VNNI__)
#define OFFSET 128
#define LANES32 16
#define HEIGHT 12 /* rows of x whose sums are in registers at once */
#define WIDTH 2   /* and vectors of a panel */
typedef __m512i sums;
ALWAYS sums none(void) { return _mm512_setzero_si512(); }
ALWAYS sums codes_of(const int8_t *w) { return _mm512_loadu_si512(w); }
ALWAYS void keep(int32_t *p, sums v) { _mm512_storeu_si512(p, v); }
ALWAYS sums four(sums total, int32_t x, sums w) { return _mm512_dpbusd_epi32(total, _mm512_set1_epi32(x), w); }
#elif defined(__AVX2__)
#define LANES32 8
#define WIDTH 2
typedef __m256i sums;
ALWAYS sums none(void) { return _mm256_setzero_si256(); }
ALWAYS sums codes_of(const int8_t *w) { return _mm256_loadu_si256((const __m256i *)w); }
ALWAYS void keep(int32_t *p, sums v) { _mm256_storeu_si256((__m256i *)p, v); }
#if defined(__AVXVNNI__)
#define OFFSET 128
#define HEIGHT 6
ALWAYS sums four(sums total, int32_t x, sums w) { return _mm256_dpbusd_avx_epi32(total, _mm256_set1_epi32(x), w); }
#else
#define HEIGHT 4
ALWAYS sums four(sums total, int32_t x, sums w)
{
    const sums all = _mm256_set1_epi32(x);
    const sums pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(all), _mm256_sign_epi8(w, all));
    return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
#endif
#ifndef LANES32
#define LANES32 16
#define HEIGHT 2
#define WIDTH 2
typedef struct { int32_t at[LANES32]; } sums;
typedef struct { int8_t at[4 * LANES32]; } many;
ALWAYS sums none(void) { return (sums){{0}}; }
ALWAYS many codes_of(const int8_t *w) { many v; memcpy(&v, w, sizeof v); return v; }
ALWAYS void keep(int32_t *p, sums v) { memcpy(p, v.at, sizeof v.at); }
ALWAYS sums four(sums total, int32_t x, many w)
{
    int8_t each[4];
    memcpy(each, &x, 4);
    for (int i = 0; i < LANES32; i++)
        total.at[i] += each[0] * w.at[4 * i] + each[1] * w.at[4 * i + 1] + each[2] * w.at[4 * i + 2] +
                       each[3] * w.at[4 * i + 3];
    return total;
}
#else
typedef sums many;
#endif
#ifndef OFFSET
#define OFFSET 0
#endif

#define STRIP (WIDTH * LANES32) /* rows of a panel that a tile takes */
#define BLOCK 96                /* rows of x that are taken to a panel in one go: a multiple of every HEIGHT */
_Static_assert(BLOCK % HEIGHT == 0 && PANEL % STRIP == 0, "tiles fill blocks and panels");

/* A multiply-add in one rounding would have other bits than the product and the sum that the reference takes. */
#if defined(__clang__)
#define TWO_ROUNDINGS static __attribute__((noinline))
#define IN_TWO _Pragma("clang fp contract(off)")
#else
#define TWO_ROUNDINGS static __attribute__((noinline, optimize("fp-contract=off")))
#define IN_TWO
#endif

/* Codes of rows, + OFFSET, and their scales: NaN for a row that is not finite, whose codes are 0.
 *
 * arrays: x, codes (uint8), scale (float32).  numbers: rows, columns, x's stride, codes' stride.  reals: the smallest
 * number that a row's largest is taken for */
#define DEFINE_CODE_ROWS(T)                                                                                            \
    KERNEL smedjan_code_rows_##T(const step *s, int rank, int threads)                                                 \
    {                                                                                                                  \
        const int64_t width = s->number[1];                                                                            \
        FOR_ROWS(s->number[0])                                                                                         \
        {                                                                                                              \
            const T##_t *x = (const T##_t *)s->array[0] + row * s->number[2];                                          \
            uint8_t *codes = (uint8_t *)s->array[1] + row * s->number[3];                                              \
            int32_t most = 0; /* as integers magnitudes are in order, infinity and NaN behind all numbers */           \
            LARGEST_OF(most)                                                                                           \
            for (int64_t i = 0; i < width; i++) {                                                                      \
                const float each = get_##T(x[i]);                                                                      \
                int32_t bits;                                                                                          \
                memcpy(&bits, &each, 4);                                                                               \
                bits &= 0x7fffffff;                                                                                    \
                most = most > bits ? most : bits;                                                                      \
            }                                                                                                          \
            const int finite = most < 0x7f800000;                                                                      \
            float largest;                                                                                             \
            memcpy(&largest, &most, 4);                                                                                \
            largest = largest > s->real[0] ? largest : s->real[0];                                                     \
            ((float *)s->array[2])[row] = finite ? largest / 127.0f : NAN;                                             \
            const float turns = 127.0f / largest;                                                                      \
            if (finite)                                                                                                \
                for (int64_t i = 0; i < width; i++)                                                                    \
                    codes[i] = (uint8_t)((int32_t)rintf(get_##T(x[i]) * turns) + OFFSET);                              \
            else                                                                                                       \
                memset(codes, OFFSET, width);                                                                          \
            memset(codes + width, OFFSET, s->number[3] - width);                                                       \
        }                                                                                                              \
    }

/* W's codes in panels, and OFFSET times the sum of each of its rows.
 *
 * arrays: codes (int8), panels (int8), taken (int32).  numbers: rows, columns */
KERNEL smedjan_code_panels(const step *s, int rank, int threads)
{
    const int64_t rows = s->number[0], width = s->number[1], quads = (width + 3) / 4;
    int64_t from, to;
    share(rows, PANEL, rank, threads, &from, &to);
    for (int64_t first = from; first < to; first += PANEL) {
        int8_t *panel = (int8_t *)s->array[1] + first * 4 * quads;
        int32_t *taken = (int32_t *)s->array[2] + first;
        for (int64_t o = 0; o < PANEL; o++) {
            const int8_t *codes = (const int8_t *)s->array[0] + (first + o) * width;
            const int64_t there = first + o < rows ? width : 0;
            int32_t total = 0;
            SUM_OF(total)
            for (int64_t i = 0; i < there; i++)
                total += codes[i];
            taken[o] = (int32_t)(OFFSET * (uint32_t)total);
            for (int64_t k = 0; k < quads; k++) {
                int8_t four[4] = {0};
                if (4 * k + 4 <= there)
                    memcpy(four, codes + 4 * k, 4);
                else
                    for (int64_t i = 4 * k; i < there; i++)
                        four[i - 4 * k] = codes[i];
                memcpy(panel + (k * PANEL + o) * 4, four, 4);
            }
        }
    }
}

/* Sums of products of HEIGHT rows of x and STRIP rows of a panel, each wherever that many may be read. */
ALWAYS void tile(const uint8_t *x, int64_t pitch, const int8_t *panel, int64_t quads, int32_t found[HEIGHT][STRIP])
{
    sums total[HEIGHT][WIDTH];
#pragma GCC unroll 12
    for (int r = 0; r < HEIGHT; r++)
#pragma GCC unroll 2
        for (int v = 0; v < WIDTH; v++)
            total[r][v] = none();
    for (int64_t k = 0; k < quads; k++) {
        many w[WIDTH];
#pragma GCC unroll 2
        for (int v = 0; v < WIDTH; v++)
            w[v] = codes_of(panel + (k * PANEL + v * LANES32) * 4);
#pragma GCC unroll 12
        for (int r = 0; r < HEIGHT; r++) {
            int32_t each;
            memcpy(&each, x + r * pitch + 4 * k, 4);
#pragma GCC unroll 2
            for (int v = 0; v < WIDTH; v++)
                total[r][v] = four(total[r][v], each, w[v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < HEIGHT; r++)
#pragma GCC unroll 2
        for (int v = 0; v < WIDTH; v++)
            keep(found[r] + v * LANES32, total[r][v]);
}

/* y = (sum scale_x) scale_w + b, a rounding each, and y's own.
 *
 * arrays: x's codes and scales, panels, taken, W's scales, bias (or NULL), y.
 * numbers: rows, O, stride of x's codes (four times the quads), stride of y */
#define DEFINE_CODE_PRODUCT(T)                                                                                         \
    TWO_ROUNDINGS void scaled_##T(const int32_t *found, const int32_t *taken, float row, const float *scale,           \
                                  const T##_t *bias, T##_t *y, int64_t count)                                          \
    {                                                                                                                  \
        IN_TWO                                                                                                         \
        if (bias)                                                                                                      \
            for (int64_t i = 0; i < count; i++) {                                                                      \
                const float sum = (float)(int32_t)((uint32_t)found[i] - (uint32_t)taken[i]);                           \
                y[i] = put_##T(sum * row * scale[i] + get_##T(bias[i]));                                               \
            }                                                                                                          \
        else                                                                                                           \
            for (int64_t i = 0; i < count; i++) {                                                                      \
                const float sum = (float)(int32_t)((uint32_t)found[i] - (uint32_t)taken[i]);                           \
                y[i] = put_##T(sum * row * scale[i]);                                                                  \
            }                                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    KERNEL smedjan_code_product_##T(const step *s, int rank, int threads)                                              \
    {                                                                                                                  \
        const int64_t rows = s->number[0], outs = s->number[1], pitch = s->number[2], stride = s->number[3];           \
        const uint8_t *x = s->array[0];                                                                                \
        const float *rows_scale = s->array[1], *scale = s->array[4];                                                   \
        const int32_t *taken = s->array[3];                                                                            \
        const T##_t *bias = s->array[5];                                                                               \
        const int64_t blocks = (rows + BLOCK - 1) / BLOCK, panels = (outs + PANEL - 1) / PANEL;                        \
        int32_t found[HEIGHT][STRIP];                                                                                  \
        int64_t from, to;                                                                                              \
        share(blocks * panels, 1, rank, threads, &from, &to);                                                          \
        for (int64_t job = from; job < to; job++) {                                                                    \
            const int64_t panel = job / blocks, top = job % blocks * BLOCK;                                            \
            const int64_t end = top + BLOCK < rows ? top + BLOCK : rows;                                               \
            for (int64_t row = top; row < end; row += HEIGHT)                                                          \
                for (int64_t o = panel * PANEL; o < (panel + 1) * PANEL && o < outs; o += STRIP) {                     \
                    const int8_t *w = (const int8_t *)s->array[2] + panel * PANEL * pitch + o % PANEL * 4;             \
                    tile(x + row * pitch, pitch, w, pitch / 4, found);                                                 \
                    for (int64_t r = 0; r < HEIGHT && row + r < end; r++)                                              \
                        scaled_##T(found[r], taken + o, rows_scale[row + r], scale + o, bias ? bias + o : NULL,        \
                                   (T##_t *)s->array[6] + (row + r) * stride + o,                                      \
                                   outs - o < STRIP ? outs - o : STRIP);                                               \
                }                                                                                                      \
        }                                                                                                              \
    }

DEFINE_CODE_ROWS(float32)
DEFINE_CODE_ROWS(bfloat16)
DEFINE_CODE_PRODUCT(float32)
DEFINE_CODE_PRODUCT(bfloat16)
