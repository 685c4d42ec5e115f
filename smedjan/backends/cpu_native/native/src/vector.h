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
ALWAYS vf mul16(vf a, vf b) { return a * b; }
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
ALWAYS vf mul16(vf a, vf b) { vf y; EACH(a.at[i] * b.at[i]); return y; }
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

#endif
