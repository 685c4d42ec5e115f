/* Attention of plans, by tiles that hold no row of scores whole, forward (Milakov & Gimelshein 2018) and backward
 * (FlashAttention-2: Dao 2023, arXiv:2307.08691, Algorithms 1 and 2):
 *
 *   s = scale q k^T, or cap tanh(scale q k^T / cap)
 *   y = softmax(s) v;  lse = log sum exp s;  a query that sees no key has y = 0 and lse = -inf
 *
 *   p = exp(s - lse);  D = sum(dy y);  ds = p (dy v^T - D), times 1 - (s / cap)^2 where there is a cap
 *   dv = p^T dy;  dk = scale ds^T q;  dq = scale ds k
 *
 * float32 inside, one rounding a result. Work is shared out so that each result has one owner: no sum depends on the
 * number of threads, but on the way that is chosen for it.
 */
#include "attention_tiles.h"

typedef struct {
    tiles t;
    view q, k, v, y, lse, dy, dq, dk, dv;
    const int8_t *mask;
    int64_t mask_batch, mask_head, mask_row;
    int64_t batch, heads, groups, queries, keys;
    int causal;
    float scale, cap, inner; /* inner: what queries are scaled by before the product, and the cap is of its tanh */
} job;

static view view_of(const step *s, int array, const int64_t *strides, int place, int narrow)
{
    const int64_t size = narrow ? 2 : 4, *of = strides + 3 * place;
    return (view){s->array[array], of[0] * size, of[1] * size, of[2] * size, narrow};
}

/* numbers: batch, query heads, key heads, queries, keys, head dim, causal, bfloat16, floats of a thread's scratch.
 * reals: scale, cap (0: none).  strides: of q, k, v, mask, y, lse, dy, dq, dk, dv, three each, in elements. */
static job job_of(const step *s, const int64_t *strides, void *scratch, int rank, int64_t totals)
{
    const int64_t *n = s->number;
    job made = {.batch = n[0], .heads = n[1], .groups = n[2], .queries = n[3], .keys = n[4], .causal = (int)n[6],
                .scale = s->real[0], .cap = s->real[1],
                .mask_batch = strides[9], .mask_head = strides[10], .mask_row = strides[11]};
    made.inner = made.cap != 0.0f ? made.scale / made.cap : made.scale;
    const uintptr_t lines = ((uintptr_t)scratch + 63) / 64 * 64;
    lay_out(&made.t, (float *)lines + rank * n[8], n[5], totals);
    return made;
}

/* Floats of scratch that a thread takes; in all, sixteen more, to begin at a cache line.  totals: 0 for a forward pass,
 * else rows of dk and dv that it sums at once */
__attribute__((visibility("default"))) int64_t smedjan_attention_floats(int64_t dim, int64_t totals)
{
    tiles t;
    return lay_out(&t, NULL, dim, totals);
}

static uint64_t visible_here(const job *w, int64_t batch, int64_t head, int64_t q, int64_t k, int *mixed)
{
    const int8_t *mask = w->mask ? w->mask + batch * w->mask_batch + head * w->mask_head : NULL;
    return visible(&w->t, mask, w->mask_row, w->causal, q, k, least(TILE, w->queries - q), least(TILE, w->keys - k),
                   mixed);
}

/* tanh(x), relative error below 3e-7: Cephes' polynomial near 0, and (1 - e) / (1 + e), e = exp(-2 |x|). */
ALWAYS vf tanh16(vf x)
{
    const vf size = max16(x, sub16(splat(0), x)), square = mul16(x, x);
    vf p = fma16(splat(-5.70498872745e-3f), square, splat(2.06390887954e-2f));
    p = fma16(p, square, splat(-5.37397155531e-2f));
    p = fma16(p, square, splat(1.33314422036e-1f));
    p = fma16(p, square, splat(-3.33332819422e-1f));
    const vf near = fma16(mul16(p, square), x, x), e = exp16(mul16(splat(-2), size));
    const vf far = div16(sub16(splat(1), e), add16(splat(1), e));
    return pick16(size, 0.625f, near, pick16(x, 0, sub16(splat(0), far), far));
}

ALWAYS void reduce8(const vf *x, vf *most, vf *sum)
{
    if (most)
        *most = max16(*most, max16(max16(max16(x[0], x[1]), max16(x[2], x[3])),
                                   max16(max16(x[4], x[5]), max16(x[6], x[7]))));
    if (sum)
        *sum = add16(*sum, add16(add16(add16(x[0], x[1]), add16(x[2], x[3])),
                                 add16(add16(x[4], x[5]), add16(x[6], x[7]))));
}

/* Scores of a tile become exp(s - high), where `high` is the largest that a query has seen; alpha is what sums that were
 * made with an earlier one are too large by. It begins at the lowest finite number: exp(-inf - high) is 0. */
static void soften(const job *w, uint64_t bits, int mixed)
{
    const tiles *t = &w->t;
    for (int strip = 0; strip < STRIPS; strip++) {
        const unsigned mine = 3u << (2 * strip);
        float *p = t->p + strip * LANES;
        const int8_t *there = t->there + strip * LANES;
        const vf before = load_float32(t->high + strip * LANES);
        vf high = before;
        for (int k = 0; k < BLOCKS; k++) {
            if (!(of_keys(bits, k) & mine))
                continue;
            vf s[BLOCK];
            for (int j = 0; j < BLOCK; j++) {
                s[j] = load_float32(p + (k * BLOCK + j) * TILE);
                if (w->cap != 0.0f)
                    s[j] = mul16(splat(w->cap), tanh16(s[j]));
                if (mixed)
                    s[j] = where16(there + (k * BLOCK + j) * TILE, s[j], splat(-INFINITY));
                if (mixed || w->cap != 0.0f)
                    store_float32(p + (k * BLOCK + j) * TILE, s[j]);
            }
            reduce8(s, &high, NULL);
        }
        const vf alpha = exp16(sub16(before, high));
        vf sum = mul16(alpha, load_float32(t->sum + strip * LANES));
        for (int k = 0; k < BLOCKS; k++) {
            const int some = (of_keys(bits, k) & mine) != 0;
            vf each[BLOCK];
            for (int j = 0; j < BLOCK; j++) {
                each[j] = splat(0);
                if (some)
                    each[j] = exp16(sub16(load_float32(p + (k * BLOCK + j) * TILE), high));
                store_float32(p + (k * BLOCK + j) * TILE, each[j]);
            }
            if (some)
                reduce8(each, NULL, &sum);
        }
        store_float32(t->high + strip * LANES, high);
        store_float32(t->alpha + strip * LANES, alpha);
        store_float32(t->sum + strip * LANES, sum);
    }
}

static void forward_tile(job *w, int64_t batch, int64_t head, int64_t q)
{
    tiles *t = &w->t;
    const int64_t rows = least(TILE, w->queries - q), group = head / (w->heads / w->groups);
    load_tile(t, w->q, batch, head, q, rows, t->queries);
    transpose(t, t->queries, rows, w->inner, t->queries_t);
    memset(t->y, 0, TILE * t->pitch * sizeof(float));
    for (int i = 0; i < TILE; i++) {
        t->high[i] = -FLT_MAX;
        t->sum[i] = 0;
    }
    for (int64_t k = 0; k < w->keys && !(w->causal && k > q + rows - 1); k += TILE) {
        int mixed;
        const uint64_t bits = visible_here(w, batch, head, q, k, &mixed);
        if (!bits)
            continue;
        const int64_t keys = least(TILE, w->keys - k);
        load_tile(t, w->k, batch, group, k, keys, t->keys);
        load_tile(t, w->v, batch, group, k, keys, t->values);
        scores(t, bits, t->keys, t->queries_t, t->p);
        soften(w, bits, mixed);
        add_to_queries(t, bits, t->p, t->values, t->y, t->alpha);
    }
    for (int64_t i = 0; i < rows; i++) {
        const int none = t->sum[i] == 0.0f;
        if (w->lse.at)
            *(float *)place(w->lse, batch, head, q + i) = none ? -INFINITY : t->high[i] + logf(t->sum[i]);
        t->alpha[i] = none ? 1.0f : t->sum[i];
    }
    store_tile(t, t->y, w->y, batch, head, q, rows, 1.0f, t->alpha);
}

/* arrays: q, k, v, mask (bool, or NULL), y, lse (each or NULL), scratch, strides (int64).  numbers, reals: job_of */
KERNEL smedjan_attention(const step *s, int rank, int threads)
{
    const int64_t *strides = s->array[7];
    const int narrow = (int)s->number[7];
    job w = job_of(s, strides, s->array[6], rank, 0);
    w.q = view_of(s, 0, strides, 0, narrow);
    w.k = view_of(s, 1, strides, 1, narrow);
    w.v = view_of(s, 2, strides, 2, narrow);
    w.mask = s->array[3];
    w.y = view_of(s, 4, strides, 4, narrow);
    w.lse = view_of(s, 5, strides, 5, 0);
    const int64_t count = (w.queries + TILE - 1) / TILE;
    int64_t from, to;
    share(w.batch * w.heads * count, 1, rank, threads, &from, &to);
    for (int64_t unit = from; unit < to; unit++)
        forward_tile(&w, unit / count / w.heads, unit / count % w.heads, in_turns(unit % count, count) * TILE);
}

/* A tile of queries and all that the backward pass reads of them. */
static void load_queries(job *w, int64_t batch, int64_t head, int64_t q)
{
    tiles *t = &w->t;
    const int64_t rows = least(TILE, w->queries - q);
    load_tile(t, w->y, batch, head, q, rows, t->queries);
    load_tile(t, w->dy, batch, head, q, rows, t->dy);
    for (int64_t i = 0; i < TILE; i++) {
        vf sum = splat(0);
        if (i < rows)
            for (int64_t d = 0; d < t->dim; d += LANES)
                sum = fma16(load_float32(t->dy + i * t->pitch + d), load_float32(t->queries + i * t->pitch + d), sum);
        const float lse = i < rows ? *(const float *)place(w->lse, batch, head, q + i) : 0;
        t->sum[i] = i < rows ? sum16(sum) : 0;
        t->alpha[i] = 1;
        t->high[i] = lse > -FLT_MAX ? lse : 0; /* of a query that sees nothing: every p is exp(-inf) */
    }
    load_tile(t, w->q, batch, head, q, rows, t->queries);
    transpose(t, t->queries, rows, w->inner, t->queries_t);
    transpose(t, t->dy, rows, 1.0f, t->dy_t);
}

static void load_keys(job *w, int64_t batch, int64_t group, int64_t k)
{
    const int64_t keys = least(TILE, w->keys - k);
    load_tile(&w->t, w->k, batch, group, k, keys, w->t.keys);
    load_tile(&w->t, w->v, batch, group, k, keys, w->t.values);
}

/* p = exp(s - lse) in s' place, ds = p (dp - D) in dp's; 0 where nobody sees. */
static void slopes(const job *w, uint64_t bits, int mixed)
{
    const tiles *t = &w->t;
    for (int strip = 0; strip < STRIPS; strip++) {
        const vf lse = load_float32(t->high + strip * LANES), inner = load_float32(t->sum + strip * LANES);
        for (int k = 0; k < BLOCKS; k++) {
            const int64_t at = k * BLOCK * TILE + strip * LANES;
            const int some = (of_keys(bits, k) & 3u << (2 * strip)) != 0;
            for (int64_t j = at; j < at + BLOCK * TILE; j += TILE) {
                vf p = splat(0), ds = splat(0);
                if (some) {
                    vf s = load_float32(t->p + j), slope = splat(1);
                    if (w->cap != 0.0f) {
                        const vf turned = tanh16(s);
                        s = mul16(splat(w->cap), turned);
                        slope = sub16(splat(1), mul16(turned, turned));
                    }
                    if (mixed)
                        s = where16(t->there + j, s, splat(-INFINITY));
                    p = exp16(sub16(s, lse));
                    ds = mul16(p, sub16(load_float32(t->ds + j), inner));
                    if (w->cap != 0.0f)
                        ds = mul16(ds, slope);
                }
                store_float32(t->p + j, p);
                store_float32(t->ds + j, ds);
            }
        }
    }
}

/* A loaded tile of queries beside a tile of keys, which is loaded when any is seen: adds to dq, or to rows `total` on of
 * dk and dv, or to both. */
static void backward_tile(job *w, int64_t batch, int64_t head, int64_t q, int64_t k, int load, int of_q, int of_k,
                          int64_t total)
{
    tiles *t = &w->t;
    int mixed;
    const uint64_t bits = visible_here(w, batch, head, q, k, &mixed);
    if (!bits)
        return;
    if (load)
        load_keys(w, batch, head / (w->heads / w->groups), k);
    scores(t, bits, t->keys, t->queries_t, t->p);
    scores(t, bits, t->values, t->dy_t, t->ds);
    slopes(w, bits, mixed);
    if (of_q)
        add_to_queries(t, bits, t->ds, t->keys, t->y, t->alpha);
    if (of_k) {
        add_to_keys(t, bits, t->p, t->dy, t->dv + total * t->pitch);
        add_to_keys(t, bits, t->ds, t->queries, t->dk + total * t->pitch);
    }
}

static void none_yet(job *w, int64_t rows)
{
    memset(w->t.dk, 0, rows * w->t.pitch * sizeof(float));
    memset(w->t.dv, 0, rows * w->t.pitch * sizeof(float));
}

static void store_keys(job *w, int64_t batch, int64_t group, int64_t k, int64_t total)
{
    const int64_t keys = least(TILE, w->keys - k);
    store_tile(&w->t, w->t.dk + total * w->t.pitch, w->dk, batch, group, k, keys, w->scale, NULL);
    store_tile(&w->t, w->t.dv + total * w->t.pitch, w->dv, batch, group, k, keys, 1.0f, NULL);
}

/* dq of a tile of queries, and with `of_k` what it adds to dk and dv. */
static void backward_queries(job *w, int64_t batch, int64_t head, int64_t q, int of_k)
{
    tiles *t = &w->t;
    const int64_t rows = least(TILE, w->queries - q);
    load_queries(w, batch, head, q);
    memset(t->y, 0, TILE * t->pitch * sizeof(float));
    for (int64_t k = 0; k < w->keys && !(w->causal && k > q + rows - 1); k += TILE)
        backward_tile(w, batch, head, q, k, 1, 1, of_k, k);
    store_tile(t, t->y, w->dq, batch, head, q, rows, w->scale, NULL);
}

/* All of a key head and its query heads: every score is computed once. */
static void backward_whole(job *w, int64_t batch, int64_t group)
{
    const int64_t times = w->heads / w->groups;
    none_yet(w, up(w->keys, TILE));
    for (int64_t head = group * times; head < (group + 1) * times; head++)
        for (int64_t q = 0; q < w->queries; q += TILE)
            backward_queries(w, batch, head, q, 1);
    for (int64_t k = 0; k < w->keys; k += TILE)
        store_keys(w, batch, group, k, k);
}

/* dk and dv of a tile of keys. */
static void backward_keys(job *w, int64_t batch, int64_t group, int64_t k)
{
    const int64_t times = w->heads / w->groups;
    none_yet(w, TILE);
    load_keys(w, batch, group, k);
    for (int64_t head = group * times; head < (group + 1) * times; head++)
        for (int64_t q = w->causal ? k : 0; q < w->queries; q += TILE) {
            load_queries(w, batch, head, q);
            backward_tile(w, batch, head, q, k, 0, 0, 1, 0);
        }
    store_keys(w, batch, group, k, 0);
}

/* arrays: q, k, v, mask (bool, or NULL), y, lse, scratch, strides (int64), dy, dq, dk, dv (each or NULL).
 * numbers, reals: job_of; and [9] whether work is split finer than key heads, for which scores are computed twice */
KERNEL smedjan_attention_bwd(const step *s, int rank, int threads)
{
    const int64_t *strides = s->array[7], split = s->number[9];
    const int narrow = (int)s->number[7];
    job w = job_of(s, strides, s->array[6], rank, split ? TILE : up(s->number[4], TILE));
    w.q = view_of(s, 0, strides, 0, narrow);
    w.k = view_of(s, 1, strides, 1, narrow);
    w.v = view_of(s, 2, strides, 2, narrow);
    w.mask = s->array[3];
    w.y = view_of(s, 4, strides, 4, narrow);
    w.lse = view_of(s, 5, strides, 5, 0);
    w.dy = view_of(s, 8, strides, 6, narrow);
    w.dq = view_of(s, 9, strides, 7, narrow);
    w.dk = view_of(s, 10, strides, 8, narrow);
    w.dv = view_of(s, 11, strides, 9, narrow);
    int64_t from, to;
    if (!split) {
        share(w.batch * w.groups, 1, rank, threads, &from, &to);
        for (int64_t unit = from; unit < to; unit++)
            backward_whole(&w, unit / w.groups, unit % w.groups);
        return;
    }
    int64_t count = (w.keys + TILE - 1) / TILE;
    share(w.batch * w.groups * count, 1, rank, threads, &from, &to);
    for (int64_t unit = from; unit < to; unit++)
        backward_keys(&w, unit / count / w.groups, unit / count % w.groups, in_turns(unit % count, count) * TILE);
    count = (w.queries + TILE - 1) / TILE;
    share(w.batch * w.heads * count, 1, rank, threads, &from, &to);
    for (int64_t unit = from; unit < to; unit++)
        backward_queries(&w, unit / count / w.heads, unit / count % w.heads, in_turns(unit % count, count) * TILE, 0);
}
