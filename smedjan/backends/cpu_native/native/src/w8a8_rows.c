/* y = x W^T + b of 8-bit integers: rows of x are coded, products of codes are summed in int32, which is exact in any
 * order, and a sum is scaled in float32 (ops/w8a8.py has the mathematics).
 *
 * The codes of W lie in panels of PANEL rows, for each four columns (a quad) those of every row, zeros behind both ends:
 * [O / PANEL] [K / 4] [PANEL] [4]. One instruction then multiplies four codes of x, the same in every lane, with four of
 * each row's. By the CPU's instructions:
 *
 *   VNNI      vpdpbusd: unsigned by signed bytes. x is coded + 128, and 128 times a row of W's sum is taken off again
 *   AVX2      vpmaddubsw of |x| and of w with x's sign: two products of at most 127^2 fit in its 16 bits
 *   others    C, a quad being [4] [PANEL], for loops that compilers vectorise: slower than floats
 */
#include "rows.h"

#define PANEL 32

#if defined(__AVX2__) && !defined(SMEDJAN_PORTABLE)
#define WIDTH 2 /* vectors of a panel whose sums are in registers at once */
#if defined(__AVX512VNNI__)
#define WAY "AVX-512 VNNI"
#define LANES32 16
#define HEIGHT 12 /* and rows of x */
#define OFFSET 128
typedef __m512i sums;
ALWAYS sums none(void) { return _mm512_setzero_si512(); }
ALWAYS sums load_codes(const int8_t *w) { return _mm512_loadu_si512(w); }
ALWAYS void keep(int32_t *p, sums v) { _mm512_storeu_si512(p, v); }
ALWAYS sums four(sums total, int32_t x, sums w) { return _mm512_dpbusd_epi32(total, _mm512_set1_epi32(x), w); }
#else
#define LANES32 8
typedef __m256i sums;
ALWAYS sums none(void) { return _mm256_setzero_si256(); }
ALWAYS sums load_codes(const int8_t *w) { return _mm256_loadu_si256((const __m256i *)w); }
ALWAYS void keep(int32_t *p, sums v) { _mm256_storeu_si256((__m256i *)p, v); }
#if defined(__AVXVNNI__)
#define WAY "AVX-VNNI"
#define HEIGHT 6
#define OFFSET 128
ALWAYS sums four(sums total, int32_t x, sums w) { return _mm256_dpbusd_avx_epi32(total, _mm256_set1_epi32(x), w); }
#else
#define WAY "AVX2"
#define HEIGHT 4
#define OFFSET 0
ALWAYS sums four(sums total, int32_t x, sums w)
{
    const sums all = _mm256_set1_epi32(x);
    const sums pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(all), _mm256_sign_epi8(w, all));
    return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
#endif
typedef sums quad;
#define PLACE(row, column) ((row) * 4 + (column)) /* in a quad of a panel */
ALWAYS quad codes_of(const int8_t *w, int64_t row) { return load_codes(w + PLACE(row, 0)); }
#else
#define WAY "plain C"
#define WIDTH 2
#define LANES32 16
#define HEIGHT 1
#define OFFSET 0
typedef const int8_t *quad;
#define PLACE(row, column) ((column) * PANEL + (row))
ALWAYS quad codes_of(const int8_t *w, int64_t row) { return w + PLACE(row, 0); }
typedef struct { int32_t at[LANES32]; } sums;
ALWAYS sums none(void) { return (sums){{0}}; }
ALWAYS void keep(int32_t *p, sums v) { memcpy(p, v.at, sizeof v.at); }
ALWAYS sums four(sums total, int32_t x, quad w)
{
    int8_t each[4];
    memcpy(each, &x, 4);
    for (int i = 0; i < LANES32; i++)
        total.at[i] += each[0] * w[PLACE(i, 0)] + each[1] * w[PLACE(i, 1)] + each[2] * w[PLACE(i, 2)] +
                       each[3] * w[PLACE(i, 3)];
    return total;
}
#endif

#define STRIP (WIDTH * LANES32) /* rows of a panel that a tile takes */
#define BLOCK 96                /* rows of x that are taken to a panel in one go: a multiple of every HEIGHT */
_Static_assert(BLOCK % HEIGHT == 0 && PANEL % STRIP == 0, "tiles fill blocks and panels");

/* Which of the ways above this build has, in words: plans say so. */
__attribute__((visibility("default"))) const char *smedjan_w8a8_way(void) { return WAY; }

/* What a sum stands for. A function of its own, that no compiler makes one rounding of this product and of the sum with
 * a bias that follows. */
static __attribute__((noinline)) void scaled(const int32_t *found, const int32_t *taken, float row, const float *scale,
                                             float *y, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        y[i] = (float)(int32_t)((uint32_t)found[i] - (uint32_t)taken[i]) * row * scale[i];
}

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
    const int64_t rows = s->number[0], width = s->number[1], whole = width / 4, quads = (width + 3) / 4;
    int64_t from, to;
    share(rows, PANEL, rank, threads, &from, &to);
    for (int64_t first = from; first < to; first += PANEL) {
        const int8_t *codes = (const int8_t *)s->array[0] + first * width;
        int8_t *panel = (int8_t *)s->array[1] + first * 4 * quads;
        int32_t *taken = (int32_t *)s->array[2] + first;
        const int64_t here = rows - first < PANEL ? rows - first : PANEL;
        if (here < PANEL || whole < quads)
            memset(panel, 0, 4 * quads * PANEL);
        for (int64_t k = 0; k < whole; k++)
            for (int64_t o = 0; o < here; o++)
                for (int64_t i = 0; i < 4; i++)
                    panel[4 * k * PANEL + PLACE(o, i)] = codes[o * width + 4 * k + i];
        for (int64_t i = 4 * whole; i < width; i++)
            for (int64_t o = 0; o < here; o++)
                panel[4 * whole * PANEL + PLACE(o, i % 4)] = codes[o * width + i];
        for (int64_t o = 0; o < PANEL; o++) {
            const int64_t there = o < here ? width : 0;
            int32_t total = 0;
            SUM_OF(total)
            for (int64_t i = 0; i < there; i++)
                total += codes[o * width + i];
            taken[o] = (int32_t)(OFFSET * (uint32_t)total);
        }
    }
}

/* Sums of products of HEIGHT rows of x, as many of which may be read, and STRIP rows of a panel from `first` on. */
ALWAYS void tile(const uint8_t *x, int64_t pitch, const int8_t *panel, int64_t first, int64_t quads,
                 int32_t found[HEIGHT][STRIP])
{
    sums total[HEIGHT][WIDTH];
#pragma GCC unroll 12
    for (int r = 0; r < HEIGHT; r++)
#pragma GCC unroll 2
        for (int v = 0; v < WIDTH; v++)
            total[r][v] = none();
    for (int64_t k = 0; k < quads; k++) {
        quad w[WIDTH];
#pragma GCC unroll 2
        for (int v = 0; v < WIDTH; v++)
            w[v] = codes_of(panel + k * 4 * PANEL, first + v * LANES32);
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
    KERNEL smedjan_code_product_##T(const step *s, int rank, int threads)                                              \
    {                                                                                                                  \
        const int64_t rows = s->number[0], outs = s->number[1], pitch = s->number[2], stride = s->number[3];           \
        const uint8_t *x = s->array[0];                                                                                \
        const float *rows_scale = s->array[1], *scale = s->array[4];                                                   \
        const int32_t *taken = s->array[3];                                                                            \
        const T##_t *bias = s->array[5];                                                                               \
        const int64_t blocks = (rows + BLOCK - 1) / BLOCK, panels = (outs + PANEL - 1) / PANEL;                        \
        int32_t found[HEIGHT][STRIP];                                                                                  \
        float made[STRIP];                                                                                             \
        int64_t from, to;                                                                                              \
        share(blocks * panels, 1, rank, threads, &from, &to);                                                          \
        for (int64_t job = from; job < to; job++) {                                                                    \
            const int64_t panel = job / blocks, top = job % blocks * BLOCK;                                            \
            const int64_t end = top + BLOCK < rows ? top + BLOCK : rows;                                               \
            for (int64_t row = top; row < end; row += HEIGHT)                                                          \
                for (int64_t o = panel * PANEL; o < (panel + 1) * PANEL && o < outs; o += STRIP) {                     \
                    const int8_t *w = (const int8_t *)s->array[2] + panel * PANEL * pitch;                             \
                    tile(x + row * pitch, pitch, w, o % PANEL, pitch / 4, found);                                      \
                    const int64_t count = outs - o < STRIP ? outs - o : STRIP;                                         \
                    for (int64_t r = 0; r < HEIGHT && row + r < end; r++) {                                            \
                        T##_t *y = (T##_t *)s->array[6] + (row + r) * stride + o;                                      \
                        const int there = !bias && sizeof *y == sizeof *made;                                          \
                        scaled(found[r], taken + o, rows_scale[row + r], scale + o, there ? (void *)y : made, count);  \
                        if (bias)                                                                                      \
                            for (int64_t i = 0; i < count; i++)                                                        \
                                y[i] = put_##T(made[i] + get_##T(bias[o + i]));                                        \
                        else if (!there)                                                                               \
                            for (int64_t i = 0; i < count; i++)                                                        \
                                y[i] = put_##T(made[i]);                                                               \
                    }                                                                                                  \
                }                                                                                                      \
        }                                                                                                              \
    }

DEFINE_CODE_ROWS(float32)
DEFINE_CODE_ROWS(bfloat16)
DEFINE_CODE_PRODUCT(float32)
DEFINE_CODE_PRODUCT(bfloat16)
