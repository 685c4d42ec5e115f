/* Sixteen float32 at a time, by the vector extension that gcc and clang share: AVX-512, AVX2 and NEON code from one
 * source. With SMEDJAN_PORTABLE the same loops run over plain arrays, for other compilers and as a second witness in the
 * tests.
 */
#ifndef SMEDJAN_VECTOR_H
#define SMEDJAN_VECTOR_H

#include "scalar.h"

#include <math.h>

#define LANES 16
#define ALWAYS static inline __attribute__((always_inline))

/* A sum whose terms may be added in any order, as lanes do. Nothing else is reordered: exp_fast's reduction would lose
 * its point. */
#define PRAGMA(text) _Pragma(#text)
#define SUM_OF(name) PRAGMA(omp simd reduction(+ : name))
#define LARGEST_OF(name) PRAGMA(omp simd reduction(max : name))

/* exp(x), relative error below 2e-7: 2^n e^r with |r| <= ln 2 / 2 and the polynomial of Cephes' expf. NaN stays NaN,
 * what is below -87.3 gives 0 and above 88.7 infinity. Vectorises, unlike libm's. */
ALWAYS float exp_fast(float x)
{
    const float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = rintf(clamped * 1.44269504088896341f);
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    const float y = p * power;
    return x < -87.3f ? 0.0f : x > 88.7f ? INFINITY : y;
}

#ifndef SMEDJAN_PORTABLE
#if defined(__AVX2__)
#include <immintrin.h>
#endif
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vu16 __attribute__((vector_size(32)));
typedef int8_t vi8 __attribute__((vector_size(16)));

/* Not 0 + x, an addition that compilers must keep: of -0 it makes 0. */
ALWAYS vf splat(float x) { return (vf){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
ALWAYS vf load_float32(const float *p) { vf v; memcpy(&v, p, 64); return v; }
/* gcc 12 takes __builtin_convertvector of bytes apart element by element: x86 has its own words for it. */
#if defined(__AVX512F__)
ALWAYS vf load_bfloat16(const bf16 *p)
{
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
ALWAYS vf load_int8(const int8_t *p)
{
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
#elif defined(__AVX2__)
typedef union { __m256 half[2]; vf whole; } halves;
ALWAYS vf load_bfloat16(const bf16 *p)
{
    halves v;
    for (int i = 0; i < 2; i++) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8 * i)));
        v.half[i] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    return v.whole;
}
ALWAYS vf load_int8(const int8_t *p)
{
    halves v;
    for (int i = 0; i < 2; i++)
        v.half[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i))));
    return v.whole;
}
#else
ALWAYS vf load_bfloat16(const bf16 *p)
{
    vu16 half;
    memcpy(&half, p, 32);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}
ALWAYS vf load_int8(const int8_t *p)
{
    vi8 codes;
    memcpy(&codes, p, 16);
    return __builtin_convertvector(__builtin_convertvector(codes, vi), vf);
}
#endif
ALWAYS void store_float32(float *p, vf v) { memcpy(p, &v, 64); }
ALWAYS void store_bfloat16(bf16 *p, vf v) /* scalar.h: narrow */
{
    const vu bits = (vu)v, even = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16, is_nan = (vu)(v != v);
    const vu made = (is_nan & (bits >> 16 | 0x40)) | (~is_nan & even);
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)made));
#else
    const vu16 half = __builtin_convertvector(made, vu16);
    memcpy(p, &half, 32);
#endif
}
ALWAYS vf fma16(vf a, vf b, vf c) { return a * b + c; }
ALWAYS vf add16(vf a, vf b) { return a + b; }
ALWAYS vf sub16(vf a, vf b) { return a - b; }
ALWAYS vf mul16(vf a, vf b) { return a * b; }
ALWAYS vf div16(vf a, vf b) { return a / b; }
/* x < limit ? below : rest */
ALWAYS vf pick16(vf x, float limit, vf below, vf rest)
{
#if defined(__AVX512F__)
    return (vf)_mm512_mask_blend_ps(_mm512_cmplt_ps_mask((__m512)x, _mm512_set1_ps(limit)), (__m512)rest, (__m512)below);
#else
    const vi yes = x < splat(limit);
    return (vf)((yes & (vi)below) | (~yes & (vi)rest));
#endif
}
/* The larger; b where one is NaN. */
ALWAYS vf max16(vf a, vf b)
{
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    const vi yes = a > b;
    return (vf)((yes & (vi)a) | (~yes & (vi)b));
#endif
}
/* Lane by lane: there[i] ? yes : no, of bytes 0 and 1. */
ALWAYS vf where16(const int8_t *there, vf yes, vf no)
{
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m128i bytes = _mm_loadu_si128((const __m128i *)there);
    return (vf)_mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), (__m512)no, (__m512)yes);
#else
    return pick16(load_int8(there), 0.5f, no, yes);
#endif
}
/* exp_fast for x <= 1, by the same numbers; to add 1.5 2^23 rounds, and leaves the integer in the last bits. */
ALWAYS vf exp16(vf x)
{
    const float magic = 12582912.0f;
    const vf high = fma16(x, splat(1.44269504088896341f), splat(magic)), n = high - magic;
    const vf r = fma16(n, splat(2.12194440e-4f), fma16(n, splat(-0.693359375f), x));
    vf p = fma16(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    p = fma16(p, r, splat(8.3334519073e-3f));
    p = fma16(p, r, splat(4.1665795894e-2f));
    p = fma16(p, r, splat(1.6666665459e-1f));
    p = fma16(p, r, splat(5.0000001201e-1f));
    p = fma16(p * r, r, r) + 1.0f;
    const vu power = ((vu)high << 23) + 0x3f800000u;
    return pick16(x, -87.3f, (vf){}, p * (vf)power);
}
ALWAYS float sum16(vf v)
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[LANES], total = 0;
    memcpy(part, &v, 64);
    for (int i = 0; i < LANES; i++)
        total += part[i];
    return total;
#endif
}
#else
typedef struct { float at[LANES]; } vf;
#define EACH(expression) do { for (int i = 0; i < LANES; i++) y.at[i] = (expression); } while (0)
ALWAYS vf splat(float x) { vf y; EACH(x); return y; }
ALWAYS vf load_float32(const float *p) { vf y; EACH(p[i]); return y; }
ALWAYS vf load_bfloat16(const bf16 *p) { vf y; EACH(widen(p[i])); return y; }
ALWAYS vf load_int8(const int8_t *p) { vf y; EACH((float)p[i]); return y; }
ALWAYS void store_float32(float *p, vf v) { memcpy(p, v.at, sizeof v.at); }
ALWAYS void store_bfloat16(bf16 *p, vf v)
{
    for (int i = 0; i < LANES; i++)
        p[i] = narrow(v.at[i]);
}
ALWAYS vf fma16(vf a, vf b, vf c) { vf y; EACH(a.at[i] * b.at[i] + c.at[i]); return y; }
ALWAYS vf add16(vf a, vf b) { vf y; EACH(a.at[i] + b.at[i]); return y; }
ALWAYS vf sub16(vf a, vf b) { vf y; EACH(a.at[i] - b.at[i]); return y; }
ALWAYS vf mul16(vf a, vf b) { vf y; EACH(a.at[i] * b.at[i]); return y; }
ALWAYS vf div16(vf a, vf b) { vf y; EACH(a.at[i] / b.at[i]); return y; }
ALWAYS vf max16(vf a, vf b) { vf y; EACH(a.at[i] > b.at[i] ? a.at[i] : b.at[i]); return y; }
ALWAYS vf pick16(vf x, float limit, vf below, vf rest) { vf y; EACH(x.at[i] < limit ? below.at[i] : rest.at[i]); return y; }
ALWAYS vf where16(const int8_t *there, vf yes, vf no) { vf y; EACH(there[i] ? yes.at[i] : no.at[i]); return y; }
ALWAYS vf exp16(vf x) { vf y; EACH(exp_fast(x.at[i])); return y; }
ALWAYS float sum16(vf v)
{
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += v.at[i];
    return total;
}
#undef EACH
#endif

#if defined(__GNUC__)
#define PREFETCH(p) __builtin_prefetch(p)
#else
#define PREFETCH(p) ((void)0)
#endif

/* y[i][j] = factor x[j][i], sixteen by sixteen; rows of x and y lie `from` and `to` floats apart. */
ALWAYS void transpose16(const float *x, int64_t from, float factor, float *y, int64_t to)
{
#if defined(__AVX512F__) && !defined(SMEDJAN_PORTABLE)
    /* Pairs of rows, then of pairs, then quarters of vectors change places, twice. */
    __m512 a[LANES], b[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        a[i] = _mm512_loadu_ps(x + i * from);
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
        a[i + 4] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        _mm512_storeu_ps(y + i * to, _mm512_mul_ps(a[i], _mm512_set1_ps(factor)));
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++)
            y[i * to + j] = factor * x[j * from + i];
#endif
}

/* sum over i < size of x[i] w[i], in float32: four sums of sixteen lanes, the rest one by one. */
#define DEFINE_DOT(type)                                                                                               \
    ALWAYS float dot_##type(const float *x, const type##_t *w, int64_t size)                                           \
    {                                                                                                                  \
        vf a = splat(0), b = splat(0), c = splat(0), d = splat(0);                                                     \
        int64_t i = 0;                                                                                                 \
        for (; i + 4 * LANES <= size; i += 4 * LANES) {                                                                \
            for (int line = 0; line < (int)(4 * LANES * sizeof(*w)); line += 64)                                       \
                PREFETCH((const char *)(w + i) + line + 1536);                                                         \
            a = fma16(load_float32(x + i), load_##type(w + i), a);                                                     \
            b = fma16(load_float32(x + i + LANES), load_##type(w + i + LANES), b);                                     \
            c = fma16(load_float32(x + i + 2 * LANES), load_##type(w + i + 2 * LANES), c);                             \
            d = fma16(load_float32(x + i + 3 * LANES), load_##type(w + i + 3 * LANES), d);                             \
        }                                                                                                              \
        for (; i + LANES <= size; i += LANES)                                                                          \
            a = fma16(load_float32(x + i), load_##type(w + i), a);                                                     \
        float rest = 0;                                                                                                \
        for (; i < size; i++)                                                                                          \
            rest += x[i] * get_##type(w[i]);                                                                           \
        return sum16(add16(add16(a, b), add16(c, d))) + rest;                                                          \
    }

#endif
