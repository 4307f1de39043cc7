/* Attention for many rows (prefill chunks, decode with a large group): compute-bound.
 *
 * Rows lie along the vector lanes, so scores, softmax and sums need no horizontal work: both
 * products are outer products of a vector of rows with one broadcast number of K or V. With bf16
 * dot products that number is a pair: two head_dim entries of K, two keys of V.
 */
#ifndef TIERKV_MANY_ROWS_H
#define TIERKV_MANY_ROWS_H

#include "step.h"

#define MANY_VECS 6
#define MANY_ROWS (MANY_VECS * W)
#define MANY_KEYS 64
#define MICRO (W == 16 ? 8 : 4) /* keys or head_dim entries per register tile; 2 vectors wide */

typedef struct { /* one item's working set, in scratch; [x][MANY_ROWS] is x-major */
    float *q;         /* [head_dim][MANY_ROWS], or bf16 pairs [head_dim / 2][MANY_ROWS] */
    float *k;         /* [MANY_KEYS][head_dim], or bf16 */
    float *v;         /* [MANY_KEYS][head_dim], or bf16 pairs [MANY_KEYS / 2][head_dim] */
    float *p;         /* [MANY_KEYS][MANY_ROWS] scores, then weights */
    float *acc;       /* [head_dim][MANY_ROWS] */
    float m[MANY_ROWS], l[MANY_ROWS], alpha[MANY_ROWS];
    int64_t from[MANY_ROWS]; /* where in q the row is */
    int32_t lo[MANY_ROWS], hi[MANY_ROWS];
    int64_t max_lo, min_hi; /* keys between them are seen by every row */
    int64_t vecs;
} Many;

static int64_t many_rows_scratch(int64_t head_dim) {
    int64_t p = max64(MANY_KEYS * MANY_ROWS, W * head_dim);
    return 2 * head_dim * MANY_ROWS + 2 * MANY_KEYS * head_dim + p;
}

static void many_layout(Many *w, float *scratch, int64_t head_dim) {
    w->q = scratch;
    w->acc = w->q + head_dim * MANY_ROWS;
    w->k = w->acc + head_dim * MANY_ROWS;
    w->v = w->k + MANY_KEYS * head_dim;
    w->p = w->v + MANY_KEYS * head_dim;
}

/* Ranges of the rows, the last repeated to fill the lanes; state as before the first key. */
static void many_start(const Args *a, const Item *it, Many *w) {
    w->vecs = (it->rows + W - 1) / W;
    w->max_lo = 0;
    w->min_hi = INT32_MAX;
    memset(w->acc, 0, (size_t)(a->head_dim * MANY_ROWS) * sizeof(float));
    for (int64_t r = 0; r < w->vecs * W; r++) {
        int64_t row = it->row0 + min64(r, it->rows - 1);
        Range seen = visible_to(a, it->seq, row / group_of(a));
        w->from[r] = query_offset(a, it->seq, it->head0, row);
        w->lo[r] = (int32_t)seen.lo;
        w->hi[r] = (int32_t)max64(0, min64(seen.hi, it->key1));
        w->max_lo = max64(w->max_lo, w->lo[r]);
        w->min_hi = min64(w->min_hi, w->hi[r]);
        w->m[r] = NO_SCORE;
        w->l[r] = 0;
    }
}

/* Lay W rows of queries across the lanes of vector v. */
INLINE void many_queries(const Args *a, Many *w, int64_t v, const int64_t dim, const int bf16,
                         const int pairs) {
    const int64_t *from = w->from + v * W, steps = pairs ? dim / 2 : dim;
    for (int64_t d = 0; d < steps; d += W) {
        vf x[W];
        const int64_t width = min64(W, steps - d);
        for (int i = 0; i < W; i++) {
            const float *pair = (const float *)((const uint16_t *)a->q + from[i]) + d;
            if (!pairs)
                x[i] = load_any(a->q, from[i] + d, bf16);
            else if (width == W)
                x[i] = load(pair);
            else {
                x[i] = splat(0);
                memcpy(&x[i], pair, (size_t)width * sizeof *pair);
            }
        }
        transpose(x);
        for (int64_t i = 0; i < width; i++) store(w->q + (d + i) * MANY_ROWS + v * W, x[i]);
    }
}

/* Hand over the finished rows of vector v. */
static void many_finish(const Args *a, const Item *it, Many *w, int64_t v, float *parts) {
    int64_t dim = a->head_dim;
    float *rows = w->p; /* no longer needed, and [W][head_dim] fits */
    for (int64_t d = 0; d < dim; d += W) {
        vf x[W];
        for (int i = 0; i < W; i++) x[i] = load(w->acc + (d + i) * MANY_ROWS + v * W);
        transpose(x);
        for (int i = 0; i < W; i++) store(rows + i * dim + d, x[i]);
    }
    for (int64_t r = v * W; r < min64(it->rows, (v + 1) * W); r++, rows += dim)
        emit_row(a, it, it->head0, r, rows, w->m[r], w->l[r], parts);
}

/* Two values, the second possibly absent, as pairs: the layout that multiplies pairs of weights. */
INLINE void many_interleave(uint32_t *to, const uint16_t *even, const uint16_t *odd,
                            const int64_t dim) {
    for (int64_t d = 0; d < dim; d += W) {
        vh low, high = {0};
        memcpy(&low, even + d, sizeof low);
        if (odd) memcpy(&high, odd + d, sizeof high);
        vu pairs = __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
        memcpy(to + d, &pairs, sizeof pairs);
    }
}

INLINE void many_widen(float *to, const void *from, const int64_t dim, const int bf16) {
    for (int64_t d = 0; d < dim; d += W) store(to + d, load_any(from, d, bf16));
}

/* Zero the keys and values from n up to a multiple of MICRO. */
INLINE void many_pad(Many *w, int64_t n, const int64_t dim, const int pairs) {
    int64_t rounded = (n + MICRO - 1) / MICRO * MICRO, halves = pairs ? 2 : 1;
    int64_t whole = pairs ? (n + 1) / 2 * 2 : n; /* interleaving filled an odd one's pair */
    memset((char *)w->k + n * dim * 4 / halves, 0, (size_t)((rounded - n) * dim * 4 / halves));
    memset((char *)w->v + whole * dim * 4 / halves, 0,
           (size_t)((rounded - whole) * dim * 4 / halves));
}

/* Ask for a key and value of the run that comes next. */
INLINE void many_prefetch(const Args *a, const Item *it, const char *kv, int64_t key,
                          const int64_t row_bytes, int64_t value_bytes) {
    if (key >= it->key1) return;
    const char *k = kv + key_offset(a, it->seq, key) * (row_bytes / a->head_dim);
    for (int64_t line = 0; line < row_bytes; line += 64) {
        __builtin_prefetch(k + line, 0, 2);
        __builtin_prefetch(k + value_bytes + line, 0, 2);
    }
}

/* Copy n keys and values to contiguous scratch; up to a multiple of MICRO they are zero. */
INLINE void many_pack(const Args *a, const Item *it, Many *w, int64_t key, int64_t n,
                      const int64_t dim, const int bf16, const int pairs) {
    const int64_t size = bf16 ? 2 : 4, value_bytes = value_stride(a) * size;
    const char *kv = (const char *)a->kv + it->head0 * head_stride(a) * size;
    for (int64_t j = 0; j < n; j += 2) {
        const char *even = kv + key_offset(a, it->seq, key + j) * size;
        const char *odd = j + 1 < n ? kv + key_offset(a, it->seq, key + j + 1) * size : NULL;
        many_prefetch(a, it, kv, key + j + MANY_KEYS, dim * size, value_bytes);
        many_prefetch(a, it, kv, key + j + 1 + MANY_KEYS, dim * size, value_bytes);
        if (pairs) {
            memcpy((uint16_t *)w->k + j * dim, even, (size_t)dim * 2);
            if (odd) memcpy((uint16_t *)w->k + (j + 1) * dim, odd, (size_t)dim * 2);
            many_interleave((uint32_t *)w->v + j / 2 * dim, (const uint16_t *)(even + value_bytes),
                            odd ? (const uint16_t *)(odd + value_bytes) : NULL, dim);
        } else {
            many_widen(w->k + j * dim, even, dim, bf16);
            many_widen(w->v + j * dim, even + value_bytes, dim, bf16);
            if (!odd) continue;
            many_widen(w->k + (j + 1) * dim, odd, dim, bf16);
            many_widen(w->v + (j + 1) * dim, odd + value_bytes, dim, bf16);
        }
    }
    many_pad(w, n, dim, pairs);
}

/* p[key][rows] = q . k for MICRO keys and `vecs` vectors of rows. */
INLINE void many_dots(Many *w, int64_t key, int64_t v, const int64_t dim, const int vecs,
                      const int pairs) {
    vf acc[MICRO][2];
    const int64_t steps = pairs ? dim / 2 : dim;
    const float *k = w->k + key * steps, *q = w->q + v * W;
#pragma GCC unroll 8
    for (int j = 0; j < MICRO; j++) acc[j][0] = acc[j][1] = splat(0);
    for (int64_t d = 0; d < steps; d++) {
        vf x[2];
#pragma GCC unroll 2
        for (int c = 0; c < vecs; c++) x[c] = load(q + d * MANY_ROWS + c * W);
#pragma GCC unroll 8
        for (int j = 0; j < MICRO; j++)
#pragma GCC unroll 2
            for (int c = 0; c < vecs; c++)
#if HAVE_DOT_BF16
                if (pairs)
                    acc[j][c] = dot_bf16(acc[j][c], (vu)x[c], (vu)splat_bits(k + j * steps + d));
                else
#endif
                    acc[j][c] += x[c] * k[j * steps + d];
    }
#pragma GCC unroll 8
    for (int j = 0; j < MICRO; j++)
#pragma GCC unroll 2
        for (int c = 0; c < vecs; c++) store(w->p + (key + j) * MANY_ROWS + (v + c) * W, acc[j][c]);
}

/* acc[d ..][rows] = acc * alpha + v . p for MICRO entries of head_dim, over `steps` keys (pairs). */
INLINE void many_values(Many *w, int64_t d, int64_t v, int64_t steps, const int64_t dim,
                        const int vecs, const int pairs) {
    vf acc[MICRO][2];
    float *sums = w->acc + d * MANY_ROWS + v * W;
    const float *p = w->p + v * W, *values = w->v + d;
#pragma GCC unroll 8
    for (int j = 0; j < MICRO; j++)
#pragma GCC unroll 2
        for (int c = 0; c < vecs; c++)
            acc[j][c] = load(sums + j * MANY_ROWS + c * W) * load(w->alpha + (v + c) * W);
    for (int64_t key = 0; key < steps; key++) {
        vf x[2];
#pragma GCC unroll 2
        for (int c = 0; c < vecs; c++) x[c] = load(p + key * MANY_ROWS + c * W);
#pragma GCC unroll 8
        for (int j = 0; j < MICRO; j++)
#pragma GCC unroll 2
            for (int c = 0; c < vecs; c++)
#if HAVE_DOT_BF16
                if (pairs)
                    acc[j][c] = dot_bf16(acc[j][c], (vu)x[c], (vu)splat_bits(values + key * dim + j));
                else
#endif
                    acc[j][c] += x[c] * values[key * dim + j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < MICRO; j++)
#pragma GCC unroll 2
        for (int c = 0; c < vecs; c++) store(sums + j * MANY_ROWS + c * W, acc[j][c]);
}

/* Scores of one vector of rows, masked where a row does not see the key; returns their maximum. */
INLINE vf many_scores(const Args *a, Many *w, int64_t v, int64_t key0, int64_t rounded, int clear) {
    vf best = load(w->m + v * W);
    vi lo, hi;
    memcpy(&lo, w->lo + v * W, sizeof lo);
    memcpy(&hi, w->hi + v * W, sizeof hi);
    for (int64_t j = 0; j < rounded; j++) {
        float *p = w->p + j * MANY_ROWS + v * W;
        vf s = to_scores(a, load(p));
        vi key = (int32_t)(key0 + j) - (vi){0};
        if (!clear) s = pick((key >= lo) & (key < hi), s, splat(-INFINITY));
        best = vmax(best, s);
        store(p, s);
    }
    return best;
}

/* Scores become weights, in pairs of keys where bf16 pairs are multiplied. */
INLINE void many_softmax(const Args *a, Many *w, int64_t v, int64_t key0, int64_t rounded,
                         int clear, const int pairs) {
    vf m = many_scores(a, w, v, key0, rounded, clear);
    vf alpha = vexp(load(w->m + v * W) - m), total = splat(0);
    for (int64_t j = 0; j < rounded; j += 2) {
        float *s = w->p + j * MANY_ROWS + v * W;
        vf even = vexp(load(s) - m), odd = vexp(load(s + MANY_ROWS) - m);
        total += even + odd;
#if HAVE_DOT_BF16
        if (pairs) {
            store(w->p + j / 2 * MANY_ROWS + v * W, (vf)pack_pairs(even, odd));
            continue;
        }
#endif
        store(s, even);
        store(s + MANY_ROWS, odd);
    }
    store(w->l + v * W, load(w->l + v * W) * alpha + total);
    store(w->m + v * W, m);
    store(w->alpha + v * W, alpha);
}

/* All rows against n <= MANY_KEYS keys. */
INLINE void many_run(const Args *a, const Item *it, Many *w, int64_t key, int64_t n,
                     const int64_t dim, const int bf16, const int pairs) {
    int64_t rounded = (n + MICRO - 1) / MICRO * MICRO, steps = pairs ? rounded / 2 : rounded;
    int clear = key >= w->max_lo && key + rounded <= w->min_hi;
    many_pack(a, it, w, key, n, dim, bf16, pairs);
    int64_t v = 0;
    for (; v + 2 <= w->vecs; v += 2)
        for (int64_t j = 0; j < rounded; j += MICRO) many_dots(w, j, v, dim, 2, pairs);
    for (; v < w->vecs; v++)
        for (int64_t j = 0; j < rounded; j += MICRO) many_dots(w, j, v, dim, 1, pairs);
    for (v = 0; v < w->vecs; v++) many_softmax(a, w, v, key, rounded, clear, pairs);
    for (v = 0; v + 2 <= w->vecs; v += 2)
        for (int64_t d = 0; d < dim; d += MICRO) many_values(w, d, v, steps, dim, 2, pairs);
    for (; v < w->vecs; v++)
        for (int64_t d = 0; d < dim; d += MICRO) many_values(w, d, v, steps, dim, 1, pairs);
}

INLINE void many_rows_body(const Args *a, const Item *it, Many *w, const int64_t dim,
                           const int bf16) {
    const int pairs = bf16 && HAVE_DOT_BF16;
    many_start(a, it, w);
    for (int64_t v = 0; v < w->vecs; v++) many_queries(a, w, v, dim, bf16, pairs);
    for (int64_t key = it->key0; key < it->key1; key += MANY_KEYS)
        many_run(a, it, w, key, min64(MANY_KEYS, it->key1 - key), dim, bf16, pairs);
}

/* Run one item, which has one KV head. */
static void many_rows(const Args *a, const Item *it, float *scratch, float *parts) {
    Many w;
    int64_t dim = a->head_dim;
    many_layout(&w, scratch, dim);
    if (a->kv_bf16 && dim == 64)
        many_rows_body(a, it, &w, 64, 1);
    else if (a->kv_bf16)
        many_rows_body(a, it, &w, dim, 1);
    else if (dim == 64)
        many_rows_body(a, it, &w, 64, 0);
    else
        many_rows_body(a, it, &w, dim, 0);
    for (int64_t v = 0; v < w.vecs; v++) many_finish(a, it, &w, v, parts);
}

#endif
