/* Eight tiles of AMX: 16 rows of 64 bytes each, of bfloat16 pairs or float32. With SMEDJAN_PORTABLE the same words are
 * plain loops, a second witness in the tests; a CPU without AMX has neither (TILES is 0), and aten's products run.
 *
 * Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: TDPBF16PS; volume 1, chapter 18.
 */
#ifndef SMEDJAN_AMX_H
#define SMEDJAN_AMX_H

#include "scalar.h"

#define TILE 16        /* rows of a tile, and columns of a tile of sums */
#define DEPTH 32       /* bfloat16 numbers of a row */
#define TILE_SIZE 512  /* bfloat16 numbers of a tile */

#if defined(SMEDJAN_PORTABLE)
#define TILES 1
#elif defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define TILES 2
#else
#define TILES 0
#endif

#if TILES == 2
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives a process its tiles when it asks for them: its threads have too large a state otherwise. */
static inline int tiles_granted(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

#define TILES_HERE
static inline void tiles_begin(void)
{
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } all = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        all.bytes[i] = 64;
        all.rows[i] = TILE;
    }
    _tile_loadconfig(&all);
}
#define TILES_END() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, bytes) _tile_loadd(t, from, bytes)
#define TILE_STREAM(t, from, bytes) _tile_stream_loadd(t, from, bytes) /* what the first cache need not keep */
#define TILE_STORE(t, to, bytes) _tile_stored(t, to, bytes)
#define TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#define LINE_SOON(x) _mm_prefetch((const char *)(x), _MM_HINT_T0)

#elif TILES == 1
static inline int tiles_granted(void) { return 1; }

typedef struct { char row[TILE][64]; } tile;

static inline void tile_load(tile *t, const void *from, int64_t bytes)
{
    for (int i = 0; i < TILE; i++)
        memcpy(t->row[i], (const char *)from + i * bytes, 64);
}

static inline void tile_store(const tile *t, void *to, int64_t bytes)
{
    for (int i = 0; i < TILE; i++)
        memcpy((char *)to + i * bytes, t->row[i], 64);
}

/* c[m, n] += (sum over pairs p of a[m, 2 p] b[p, 2 n]) + (the same of a[m, 2 p + 1] b[p, 2 n + 1]), as the instruction's
 * page sums them, so that both give the same bits. */
static inline void tile_dot(tile *c, const tile *a, const tile *b)
{
    for (int m = 0; m < TILE; m++)
        for (int n = 0; n < TILE; n++) {
            float sum, even = 0.0f, odd = 0.0f;
            for (int p = 0; p < TILE; p++) {
                bf16 x[2], y[2];
                memcpy(x, a->row[m] + 4 * p, 4);
                memcpy(y, b->row[p] + 4 * n, 4);
                even += widen(x[0]) * widen(y[0]);
                odd += widen(x[1]) * widen(y[1]);
            }
            memcpy(&sum, c->row[m] + 4 * n, 4);
            sum += even + odd;
            memcpy(c->row[m] + 4 * n, &sum, 4);
        }
}

#define TILES_HERE tile tiles[8];
static inline void tiles_begin(void) {}
#define TILES_END() ((void)0)
#define TILE_ZERO(t) memset(&tiles[t], 0, sizeof(tile))
#define TILE_LOAD(t, from, bytes) tile_load(&tiles[t], from, bytes)
#define TILE_STREAM TILE_LOAD
#define TILE_STORE(t, to, bytes) tile_store(&tiles[t], to, bytes)
#define TILE_DOT(c, a, b) tile_dot(&tiles[c], &tiles[a], &tiles[b])
#define LINE_SOON(x) ((void)(x))
#endif

#endif
