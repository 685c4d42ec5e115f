/* out = a b (+ plus) of float32 on AMX's tiles, whose operands are bfloat16: each number is the sum of three of them,
 *
 *     x = h + m + l,    h = bf16(x),    m = bf16(x - h),    l = x - h - m
 *
 * which is exact (3 x 8 bits are the 24 of float32), and six of the nine products make
 *
 *     a b = ah bh + (am bh + ah bm) + (al bh + ah bl + am bm) + e,    |e| <= (2^-23 + 2^-32) |a| |b|
 *
 * since |m| <= 2^-8 |x| and |l| <= 2^-16 |x|: at most two roundings of a product in float32 are left out. Products of
 * bfloat16 are exact in float32. TDPBF16PS rounds sums of 16 of them among themselves, then twice where they go into the
 * total, which is rounded less often so than by a loop of FMAs: the result is nearer the truth than MKL's.
 *
 * Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations,
 * 2019 (arXiv 1904.06376), section 3: three terms, six products.
 *
 * AMX takes subnormal numbers for zero: an error of 2^-126 |b| for each a, where an a is below 2^-110, and the same with
 * a and b changed. A number that is not finite, or above 2^128 (1 - 2^-9), makes NaN of what it takes part in.
 */
#define _GNU_SOURCE /* syscall */
#include "amx_blocks.h"

#if TILES

#define TERMS 3
#define BLOCK_SIZE (BLOCK * DEPTH)              /* numbers of 32 lines in a step of the depth */
#define OPERAND (TERMS * BLOCK_SIZE)            /* their terms */

/* A step of the depth takes number p of 16 and number p + 16 together, of both operands: as good an order as any other,
 * and one in which two loads make a row of pairs. The terms h, m, l of 32 lines, each two tiles of 16 rows; what is not
 * there is 0. A tile's row is a line, with its pairs; `across`, where a row in memory is a place of the depth, it is a
 * pair, with its lines.
 */
#if TILES == 2
static inline __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

/* Row i of a tile, pairs of `left` and `right`, to its place in each term's. */
static inline __attribute__((always_inline)) void split_row(bf16 *const *terms, int64_t at, __m512 left, __m512 right)
{
    const __m512i half = _mm512_set1_epi32(0x8000), kept = _mm512_set1_epi32((int)0xffff0000);
    for (int term = 0; term < TERMS; term++) {
        __m512i p = _mm512_castps_si512(left), q = _mm512_castps_si512(right);
        if (term < TERMS - 1) {
            p = _mm512_add_epi32(p, half);
            q = _mm512_add_epi32(q, half);
        }
        q = _mm512_and_si512(q, kept);
        _mm512_storeu_si512(terms[term] + at, _mm512_or_si512(_mm512_srli_epi32(p, 16), q));
        if (term < TERMS - 1) {
            left = _mm512_sub_ps(left, _mm512_castsi512_ps(_mm512_and_si512(p, kept)));
            right = _mm512_sub_ps(right, _mm512_castsi512_ps(q));
        }
    }
}

static inline void split(bf16 *const *terms, const float *x, int64_t pitch, int across, int64_t lines, int64_t depth)
{
    const int64_t right = across ? TILE * pitch : TILE; /* from a number to its pair's other one */
    for (int64_t tile = 0; tile < 2; tile++) {
        const int64_t rest = lines - tile * TILE;
        const float *row = x + (across ? tile * TILE : tile * TILE * pitch);
        bf16 *const here[TERMS] = {terms[0] + tile * TILE_SIZE, terms[1] + tile * TILE_SIZE, terms[2] + tile * TILE_SIZE};
        if (rest >= TILE && depth >= DEPTH) {
            for (int64_t i = 0; i < TILE; i++, row += pitch)
                split_row(here, i * DEPTH, _mm512_loadu_ps(row), _mm512_loadu_ps(row + right));
            continue;
        }
        for (int64_t i = 0; i < TILE; i++, row += pitch) {
            const __mmask16 p = first16(across ? (i < depth ? rest : 0) : i < rest ? depth : 0);
            const __mmask16 q = first16(across ? (i + TILE < depth ? rest : 0) : i < rest ? depth - TILE : 0);
            split_row(here, i * DEPTH, _mm512_maskz_loadu_ps(p, row), _mm512_maskz_loadu_ps(q, row + right));
        }
    }
}

/* Two tiles, each turned: 16 x 16 pairs. Quarters of four rows by loads, which leaves half of the shuffles. */
static inline void turn(bf16 *to, const bf16 *x)
{
    for (int half = 0; half < 2; half++)
        for (int quarter = 0; quarter < 4; quarter++) {
            const bf16 *from = x + half * TILE_SIZE + quarter * 8;
            __m512i r[4], t[4];
            for (int i = 0; i < 4; i++) {
                r[i] = _mm512_castsi128_si512(_mm_load_si128((const __m128i *)(from + i * DEPTH)));
                r[i] = _mm512_inserti32x4(r[i], _mm_load_si128((const __m128i *)(from + (4 + i) * DEPTH)), 1);
                r[i] = _mm512_inserti32x4(r[i], _mm_load_si128((const __m128i *)(from + (8 + i) * DEPTH)), 2);
                r[i] = _mm512_inserti32x4(r[i], _mm_load_si128((const __m128i *)(from + (12 + i) * DEPTH)), 3);
            }
            for (int i = 0; i < 4; i += 2) {
                t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
                t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
            }
            bf16 *there = to + half * TILE_SIZE + quarter * 4 * DEPTH;
            _mm512_storeu_si512(there, _mm512_unpacklo_epi64(t[0], t[2]));
            _mm512_storeu_si512(there + DEPTH, _mm512_unpackhi_epi64(t[0], t[2]));
            _mm512_storeu_si512(there + 2 * DEPTH, _mm512_unpacklo_epi64(t[1], t[3]));
            _mm512_storeu_si512(there + 3 * DEPTH, _mm512_unpackhi_epi64(t[1], t[3]));
        }
}
#else
static inline void split(bf16 *const *terms, const float *x, int64_t pitch, int across, int64_t lines, int64_t depth)
{
    for (int64_t line = 0; line < BLOCK; line++)
        for (int64_t k = 0; k < DEPTH; k++) {
            const int64_t pair = k % TILE, other = line % TILE;
            const int64_t place = across ? pair * DEPTH + 2 * other : other * DEPTH + 2 * pair;
            float rest = line < lines && k < depth ? x[across ? k * pitch + line : line * pitch + k] : 0.0f;
            for (int term = 0; term < TERMS; term++) {
                uint32_t bits;
                memcpy(&bits, &rest, 4);
                const bf16 each = {(uint16_t)((bits + (term < TERMS - 1 ? 0x8000u : 0u)) >> 16)};
                terms[term][line / TILE * TILE_SIZE + place + k / TILE] = each;
                rest -= widen(each);
            }
        }
}

static inline void turn(bf16 *to, const bf16 *x)
{
    for (int64_t half = 0; half < BLOCK_SIZE; half += TILE_SIZE)
        for (int64_t i = 0; i < TILE; i++)
            for (int64_t j = 0; j < TILE; j++)
                memcpy(to + half + j * DEPTH + 2 * i, x + half + i * DEPTH + 2 * j, 4);
}
#endif

/* 32 lines of an operand in a step of the depth, its terms at `places`; `turned`: rows of tiles are to be what `split`
 * would not make them. */
static inline void put(bf16 *const *places, const float *x, int64_t pitch, int across, int turned, int64_t lines,
                       int64_t depth)
{
    if (!turned) {
        split(places, x, pitch, across, lines, depth);
        return;
    }
    _Alignas(64) bf16 room[OPERAND];
    bf16 *const terms[TERMS] = {room, room + BLOCK_SIZE, room + 2 * BLOCK_SIZE};
    split(terms, x, pitch, across, lines, depth);
    for (int term = 0; term < TERMS; term++)
        turn(places[term], terms[term]);
}

/* Terms lie in the order in which they are read: of a l, m, h, of b h, l, m. */
static inline void put_a(bf16 *to, const float *a, int64_t pitch, int across, int64_t rows, int64_t depth)
{
    bf16 *const places[TERMS] = {to + 2 * BLOCK_SIZE, to + BLOCK_SIZE, to};
    put(places, a, pitch, across, across, rows, depth);
}

static inline void put_b(bf16 *to, const float *b, int64_t pitch, int across, int64_t columns, int64_t depth)
{
    bf16 *const places[TERMS] = {to, to + 2 * BLOCK_SIZE, to + BLOCK_SIZE};
    put(places, b, pitch, across, !across, columns, depth);
}

/* arrays: a, tiles, the count of the product's shares that are taken: none yet
 * numbers: rows, depth, pitch, whether a lies across
 *
 * Blocks of 32 rows, of each its steps of the depth, of these the terms. */
__attribute__((visibility("default"))) void smedjan_amx_split(const step *s, int rank, int threads)
{
    const int64_t rows = s->number[0], depth = s->number[1], pitch = s->number[2];
    const int across = s->number[3] != 0;
    const float *a = s->array[0];
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK, steps = (depth + DEPTH - 1) / DEPTH;
    int64_t from, to;
    if (rank == 0)
        *(int64_t *)s->array[2] = 0;
    share(blocks * steps, 1, rank, threads, &from, &to);
    for (int64_t each = from; each < to; each++) {
        const int64_t row = each / steps * BLOCK, k = each % steps * DEPTH;
        put_a((bf16 *)s->array[1] + each * OPERAND, across ? a + k * pitch + row : a + row * pitch + k, pitch, across,
              least(BLOCK, rows - row), least(DEPTH, depth - k));
    }
}

/* sums[32, 32] = block panel, `steps` of the depth */
static inline void multiply(const bf16 *a, const bf16 *b, int64_t steps, float *sums, int64_t pitch)
{
    TILES_HERE
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
#define BOTH_ROWS()                                                                                                    \
    TILE_DOT(0, 4, 6);                                                                                                 \
    TILE_DOT(1, 4, 7);                                                                                                 \
    TILE_DOT(2, 5, 6);                                                                                                 \
    TILE_DOT(3, 5, 7)
#define LOAD_A(place)                                                                                                  \
    TILE_LOAD(4, a + (place) * BLOCK_SIZE, 64);                                                                        \
    TILE_LOAD(5, a + (place) * BLOCK_SIZE + TILE_SIZE, 64)
#define LOAD_B(place)                                                                                                  \
    TILE_LOAD(6, b + (place) * BLOCK_SIZE, 64);                                                                        \
    TILE_LOAD(7, b + (place) * BLOCK_SIZE + TILE_SIZE, 64)
/* The next step's operands come from the second cache, and a from the third: in good time. */
#define NEXT(part)                                                                                                     \
    for (int line = 0; line < TILE; line++) {                                                                          \
        LINE_SOON(a + OPERAND + (part) * TILE_SIZE + line * DEPTH);                                                    \
        LINE_SOON(b + OPERAND + (part) * TILE_SIZE + line * DEPTH);                                                    \
    }
    for (int64_t k = 0; k < steps; k++, a += OPERAND, b += OPERAND) {
        LOAD_B(0); /* h */
        LOAD_A(0); /* l */
        BOTH_ROWS();
        NEXT(0)
        LOAD_A(1); /* m */
        BOTH_ROWS();
        NEXT(1)
        LOAD_A(2); /* h */
        BOTH_ROWS();
        NEXT(2)
        LOAD_B(1); /* l */
        BOTH_ROWS();
        NEXT(3)
        LOAD_B(2); /* m */
        BOTH_ROWS();
        NEXT(4)
        LOAD_A(1); /* m */
        BOTH_ROWS();
        NEXT(5)
    }
    const int64_t bytes = pitch * (int64_t)sizeof(float);
    TILE_STORE(0, sums, bytes);
    TILE_STORE(1, sums + TILE, bytes);
    TILE_STORE(2, sums + TILE * pitch, bytes);
    TILE_STORE(3, sums + TILE * pitch + TILE, bytes);
}

DEFINE_WRITE(float32)

/* arrays: a's tiles, b, plus, out, room, the count of shares that are taken
 * numbers: rows, columns, depth; pitch of b, whether it lies across; pitch of plus; of out; group
 *
 * Columns are taken in panels of 32, `group` panels at a time: their part of b is put in tiles, which stay in the
 * second cache while blocks of a pass. `room` has for each thread the tiles of `group` panels. Threads take shares as
 * they come to them, since AMX may be slower on one core than on another; who takes one changes no bit. */
__attribute__((visibility("default"))) void smedjan_amx_float32(const step *s, int rank, int threads)
{
    const int64_t *n = s->number, rows = n[0], columns = n[1], depth = n[2], pitch = n[3], plus_pitch = n[5];
    const int64_t out_pitch = n[6], group = n[7];
    const int across_depth = n[4] != 0;
    const bf16 *a = s->array[0];
    const float *b = s->array[1], *plus = s->array[2];
    float *out = s->array[3];
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK, panels = (columns + BLOCK - 1) / BLOCK;
    const int64_t steps = (depth + DEPTH - 1) / DEPTH, size = steps * OPERAND;
    const int64_t groups = (panels + group - 1) / group, down = threads / fitting(threads, panels);
    int64_t *taken = s->array[5], each;
    bf16 *tiles = (bf16 *)s->array[4] + rank * group * size;
    float sums[BLOCK * BLOCK];
    tiles_begin();
    while ((each = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)) < groups * down) {
        const int64_t panel = each % groups * group, count = least(group, panels - panel);
        const int64_t from = blocks * (each / groups) / down, to = blocks * (each / groups + 1) / down;
        for (int64_t i = 0; i < count; i++) {
            const int64_t column = (panel + i) * BLOCK;
            for (int64_t k = 0; k < steps; k++)
                put_b(tiles + i * size + k * OPERAND,
                      across_depth ? b + k * DEPTH * pitch + column : b + column * pitch + k * DEPTH, pitch,
                      across_depth, least(BLOCK, columns - column), least(DEPTH, depth - k * DEPTH));
        }
        for (int64_t block = from; block < to; block++)
            for (int64_t i = 0; i < count; i++) {
                const int64_t row = block * BLOCK, column = (panel + i) * BLOCK;
                const int64_t high = least(BLOCK, rows - row), wide = least(BLOCK, columns - column);
                float *to = out + row * out_pitch + column;
                if (plus == NULL && high == BLOCK && wide == BLOCK) {
                    multiply(a + block * size, tiles + i * size, steps, to, out_pitch);
                    continue;
                }
                multiply(a + block * size, tiles + i * size, steps, sums, BLOCK);
                write_float32(sums, plus ? plus + row * plus_pitch + column : NULL, plus_pitch, to, out_pitch, high,
                              wide);
            }
    }
    TILES_END();
}
#endif
