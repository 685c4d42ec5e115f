/* out = a b (+ plus) of bfloat16 on AMX's tiles: sums in float32, rounded once, `plus` added before that.
 *
 * Columns are taken in panels of 32, `group` panels at a time: their part of b is put in tiles, which stay in the
 * second cache while rows of a pass, 32 at a time. Rows of a are read where they lie, if they are whole; else a block
 * of them is put in tiles first, with zeros around. A long depth is taken in parts, and sums wait in between.
 *
 * The operands lie in tiles as TDPBF16PS wants them: a row of a as it is, b with its rows in pairs, [depth / 2, n, 2].
 */
#define _GNU_SOURCE /* syscall */
#include "amx_blocks.h"

__attribute__((visibility("default"))) int smedjan_amx(void);

#if TILES == 0
int smedjan_amx(void) { return 0; }
#else
int smedjan_amx(void) { return tiles_granted(); }

#if TILES == 2
/* r[i][j] -> r[j][i], 16 x 16 of 32 bits */
static inline void transpose(__m512i *r)
{
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

static inline __mmask32 first(int64_t count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0; }

/* 16 rows of 32 numbers, of which `rows` and `wide` are there, the others 0 */
static inline void read_rows(__m512i *r, const bf16 *x, int64_t pitch, int64_t rows, int64_t wide)
{
    const __mmask32 keep = first(wide);
    for (int i = 0; i < TILE; i++)
        r[i] = i < rows ? _mm512_maskz_loadu_epi16(keep, x + i * pitch) : _mm512_setzero_si512();
}

static inline void write_tile(bf16 *to, const __m512i *r)
{
    for (int i = 0; i < TILE; i++)
        _mm512_storeu_si512(to + DEPTH * i, r[i]);
}

/* Rows 2 i and 2 i + 1 of 32 columns in pairs: low[i] has columns 0 to 15, high[i] the others. */
static inline void read_pairs(__m512i *low, __m512i *high, const bf16 *x, int64_t pitch, int64_t rows, int64_t wide)
{
    const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    const __mmask32 keep = first(wide);
    for (int i = 0; i < TILE; i++) {
        const bf16 *row = x + 2 * i * pitch;
        const __m512i even = 2 * i < rows ? _mm512_maskz_loadu_epi16(keep, row) : _mm512_setzero_si512();
        const __m512i odd = 2 * i + 1 < rows ? _mm512_maskz_loadu_epi16(keep, row + pitch) : _mm512_setzero_si512();
        low[i] = _mm512_permutex2var_epi16(even, lower, odd);
        high[i] = _mm512_permutex2var_epi16(even, upper, odd);
    }
}

/* 32 lines along the depth, as they are: two tiles of 16 lines */
static inline void put_lines(bf16 *to, const bf16 *x, int64_t pitch, int64_t lines, int64_t depth, int turned)
{
    for (int half = 0; half < 2; half++) {
        __m512i r[16];
        read_rows(r, x + half * TILE * pitch, pitch, lines - half * TILE, depth);
        if (turned)
            transpose(r);
        write_tile(to + half * TILE_SIZE, r);
    }
}

/* 32 lines across the depth, which is rows here */
static inline void put_across(bf16 *to, const bf16 *x, int64_t pitch, int64_t lines, int64_t depth, int turned)
{
    __m512i low[16], high[16];
    read_pairs(low, high, x, pitch, depth, lines);
    if (turned) {
        transpose(low);
        transpose(high);
    }
    write_tile(to, low);
    write_tile(to + TILE_SIZE, high);
}
#else
static inline void put_lines(bf16 *to, const bf16 *x, int64_t pitch, int64_t lines, int64_t depth, int turned)
{
    for (int64_t i = 0; i < BLOCK; i++)
        for (int64_t k = 0; k < DEPTH; k++) {
            const bf16 each = i < lines && k < depth ? x[i * pitch + k] : (bf16){0};
            const int64_t line = i % TILE;
            to[i / TILE * TILE_SIZE + (turned ? k / 2 * DEPTH + 2 * line + k % 2 : line * DEPTH + k)] = each;
        }
}

static inline void put_across(bf16 *to, const bf16 *x, int64_t pitch, int64_t lines, int64_t depth, int turned)
{
    for (int64_t i = 0; i < BLOCK; i++)
        for (int64_t k = 0; k < DEPTH; k++) {
            const bf16 each = i < lines && k < depth ? x[k * pitch + i] : (bf16){0};
            const int64_t line = i % TILE;
            to[i / TILE * TILE_SIZE + (turned ? line * DEPTH + k : k / 2 * DEPTH + 2 * line + k % 2)] = each;
        }
}
#endif

/* A block of a: 32 rows, two tiles a step of the depth. */
static void put_a(bf16 *to, const bf16 *a, int64_t pitch, int across, int64_t rows, int64_t depth)
{
    for (int64_t k = 0; k < depth; k += DEPTH, to += 2 * TILE_SIZE)
        if (across)
            put_across(to, a + k * pitch, pitch, rows, depth - k, 1);
        else
            put_lines(to, a + k, pitch, rows, depth - k, 0);
}

/* A panel of b: 32 columns, two tiles a step of the depth. */
static void put_b(bf16 *to, const bf16 *b, int64_t pitch, int across, int64_t columns, int64_t depth)
{
    for (int64_t k = 0; k < depth; k += DEPTH, to += 2 * TILE_SIZE)
        if (across)
            put_across(to, b + k * pitch, pitch, columns, depth - k, 0);
        else
            put_lines(to, b + k, pitch, columns, depth - k, 1);
}

typedef struct {
    const bf16 *a[2]; /* the upper and the lower tile's rows */
    int64_t pitch, step;
} rows_of_a;

/* sums[32, 32] (+)= block panel */
static inline void multiply(const rows_of_a *block, const bf16 *panel, int64_t depth, float *sums, int more)
{
    TILES_HERE
    const int64_t bytes = BLOCK * sizeof(float);
    if (more) {
        TILE_LOAD(0, sums, bytes);
        TILE_LOAD(1, sums + TILE, bytes);
        TILE_LOAD(2, sums + TILE * BLOCK, bytes);
        TILE_LOAD(3, sums + TILE * BLOCK + TILE, bytes);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    const bf16 *upper = block->a[0], *lower = block->a[1];
    for (int64_t k = 0; k < depth; k += DEPTH) {
        TILE_LOAD(4, upper, block->pitch);
        TILE_STREAM(6, panel, 64);
        TILE_STREAM(7, panel + TILE_SIZE, 64);
        TILE_LOAD(5, lower, block->pitch);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
        upper += block->step;
        lower += block->step;
        panel += 2 * TILE_SIZE;
    }
    TILE_STORE(0, sums, bytes);
    TILE_STORE(1, sums + TILE, bytes);
    TILE_STORE(2, sums + TILE * BLOCK, bytes);
    TILE_STORE(3, sums + TILE * BLOCK + TILE, bytes);
}

DEFINE_WRITE(float32)
DEFINE_WRITE(bfloat16)

typedef struct {
    const bf16 *a, *b;
    const char *plus;
    char *out;
    int64_t a_pitch, b_pitch, plus_pitch, out_pitch;
    int64_t depth, part, group;
    int a_across, b_across, wide;
} product;

static void write_block(const product *p, const float *sums, int64_t row, int64_t column, int64_t rows, int64_t columns)
{
    const int64_t more = row * p->plus_pitch + column, at = row * p->out_pitch + column;
    if (p->wide)
        write_float32(sums, p->plus ? (const float *)p->plus + more : NULL, p->plus_pitch, (float *)p->out + at,
                      p->out_pitch, rows, columns);
    else
        write_bfloat16(sums, p->plus ? (const bf16 *)p->plus + more : NULL, p->plus_pitch, (bf16 *)p->out + at,
                       p->out_pitch, rows, columns);
}

/* Rows [from, to) times the columns of panels [first, first + count). */
static void multiply_panels(const product *p, int64_t from, int64_t to, int64_t first, int64_t count, int64_t columns,
                            bf16 *block, bf16 *tiles, float *sums)
{
    const int whole = p->depth <= p->part;
    for (int64_t k = 0; k == 0 || k < p->depth; k += p->part) {
        const int64_t deep = least(p->part, p->depth - k);
        for (int64_t i = 0; i < count; i++) {
            const int64_t column = (first + i) * BLOCK;
            const bf16 *b = p->b_across ? p->b + k * p->b_pitch + column : p->b + column * p->b_pitch + k;
            put_b(tiles + i * BLOCK * p->part, b, p->b_pitch, p->b_across, least(BLOCK, columns - column), deep);
        }
        for (int64_t row = from; row < to; row += BLOCK) {
            const int64_t rows = least(BLOCK, to - row);
            const bf16 *a = p->a_across ? p->a + k * p->a_pitch + row : p->a + row * p->a_pitch + k;
            rows_of_a here = {{a, a + TILE * p->a_pitch}, p->a_pitch * (int64_t)sizeof(bf16), DEPTH};
            if (p->a_across || rows < BLOCK || deep % DEPTH) {
                put_a(block, a, p->a_pitch, p->a_across, rows, deep);
                here = (rows_of_a){{block, block + TILE_SIZE}, 64, 2 * TILE_SIZE};
            }
            for (int64_t i = 0; i < count; i++) {
                const int64_t column = (first + i) * BLOCK, waits = whole ? i % 2 : (row - from) / BLOCK * p->group + i;
                float *each = sums + waits * BLOCK * BLOCK;
                multiply(&here, tiles + i * BLOCK * p->part, deep, each, k > 0);
                if (k + p->part >= p->depth)
                    write_block(p, each, row, column, rows, least(BLOCK, columns - column));
            }
        }
    }
}

/* arrays: a, b, plus, out, room
 * numbers: rows, columns, depth; pitch of a, whether it lies across; of b; pitch of plus; of out; group; part; float32
 *
 * a is [rows, depth], b [depth, columns]. What lies "across" has its depth outermost in memory; a pitch is between rows
 * as they lie there. `room` has for each thread a block of a and `group` panels of b, `part` (a multiple of 32) deep,
 * and then the sums: two, or where the depth is taken in parts, those of HELD rows. */
#define HELD 1024

__attribute__((visibility("default"))) void smedjan_amx_product(const step *s, int rank, int threads)
{
    const int64_t *n = s->number, rows = n[0], columns = n[1];
    const product p = {
        .a = s->array[0], .b = s->array[1], .plus = s->array[2], .out = s->array[3], .depth = n[2],
        .a_pitch = n[3], .a_across = n[4] != 0, .b_pitch = n[5], .b_across = n[6] != 0,
        .plus_pitch = n[7], .out_pitch = n[8], .group = n[9], .part = n[10], .wide = n[11] != 0,
    };
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK, panels = (columns + BLOCK - 1) / BLOCK;
    /* Where a is put in tiles, threads share its rows: each puts its own there, and no other one. */
    const int high = p.a_across ? fitting(threads, blocks) : threads / fitting(threads, panels);
    const int across = threads / high;
    const int64_t from = blocks * (rank / across) / high * BLOCK;
    const int64_t to = least(blocks * (rank / across + 1) / high * BLOCK, rows);
    const int64_t first = panels * (rank % across) / across, last = panels * (rank % across + 1) / across;
    const int64_t held = p.depth <= p.part ? 2 : HELD / BLOCK * p.group;
    const int64_t operands = (1 + p.group) * BLOCK * p.part, sum_count = held * BLOCK * BLOCK;
    const int64_t own = operands * (int64_t)sizeof(bf16) + sum_count * (int64_t)sizeof(float);
    bf16 *block = (bf16 *)((char *)s->array[4] + rank * own), *tiles = block + BLOCK * p.part;
    float *sums = (float *)(tiles + p.group * BLOCK * p.part);
    const int64_t stride = p.depth <= p.part ? to - from : HELD;
    tiles_begin();
    for (int64_t row = from; row < to; row += stride)
        for (int64_t panel = first; panel < last; panel += p.group)
            multiply_panels(&p, row, least(row + stride, to), panel, least(p.group, last - panel), columns, block,
                            tiles, sums);
    TILES_END();
}
#endif
