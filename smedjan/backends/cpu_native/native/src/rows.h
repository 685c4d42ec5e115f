/* Kernels over rows, written once for both dtypes of activations: each is a macro over a suffix, and `ROWS` gives the
 * share of a rank. A row of an array begins `stride` elements behind the one before it, its elements lie side by side.
 */
#ifndef SMEDJAN_ROWS_H
#define SMEDJAN_ROWS_H

#include "scalar.h"
#include "tape.h"

#include <math.h>

#define ALWAYS static inline __attribute__((always_inline))

#define KERNEL __attribute__((visibility("default"))) void
/* A result may lie where an operand lay, element for element: each is read before its place is written. */
#define EACH_ELEMENT _Pragma("GCC ivdep")
/* A sum whose terms may be added in any order, as lanes do. Nothing else is reordered: exp_fast's reduction would lose
 * its point. */
#define PRAGMA(text) _Pragma(#text)
#define SUM_OF(name) PRAGMA(omp simd reduction(+ : name))
#define LARGEST_OF(name) PRAGMA(omp simd reduction(max : name))

#define FOR_ROWS(count)                                                                                                \
    int64_t first_row, last_row;                                                                                       \
    share(count, 1, rank, threads, &first_row, &last_row);                                                             \
    for (int64_t row = first_row; row < last_row; row++)

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
