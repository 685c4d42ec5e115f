/* Numbers as kernels read and write them. Arithmetic is float32 throughout; bfloat16 is widened by a shift and rounded
 * to nearest, ties to even, when it is written.
 */
#ifndef SMEDJAN_SCALAR_H
#define SMEDJAN_SCALAR_H

#include <stdint.h>
#include <string.h>

typedef struct { uint16_t bits; } bf16;

static inline float widen(bf16 x)
{
    const uint32_t bits = (uint32_t)x.bits << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline bf16 narrow(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (bf16){(uint16_t)(bits >> 16 | 0x40)}; /* NaN stays one */
    return (bf16){(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

/* Kernels are written once for both dtypes of activations, as macros over a suffix. */
#define float32_t float
#define bfloat16_t bf16
static inline float get_float32(float x) { return x; }
static inline float get_bfloat16(bf16 x) { return widen(x); }
static inline float get_int8(int8_t x) { return x; }
static inline float put_float32(float x) { return x; }
static inline bf16 put_bfloat16(float x) { return narrow(x); }

#endif
