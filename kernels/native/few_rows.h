/* Attention for few rows (decode): memory-bound, so keys are read in place and in order.
 *
 * Scores are dot products along head_dim, W keys at a time; all of an item's KV heads visit one
 * run of keys before any visits the next, because a block's heads lie side by side in memory.
 */
#ifndef TIERKV_FEW_ROWS_H
#define TIERKV_FEW_ROWS_H

#include "step.h"

#define FEW_ROWS 8 /* most folded rows this path takes */
#define FEW_KEYS 64

typedef struct { /* one KV head's rows between runs of keys */
    float m[FEW_ROWS], l[FEW_ROWS];
} FewState;

typedef struct { /* n keys of one KV head, and the ones whose turn is next */
    const char *k, *v, *next_k, *next_v;
    const int64_t *offsets, *next_offsets; /* of the keys, in elements */
    int64_t key0, n;
} FewRun;

/* Floats of scratch an item needs: fp32 queries, sums, state. */
static int64_t few_rows_scratch(int64_t heads, int64_t rows, int64_t head_dim) {
    return 2 * heads * rows * head_dim + heads * (int64_t)(sizeof(FewState) / sizeof(float));
}

/* Ask for a key or value that comes next, into the second-level cache. */
INLINE void few_prefetch(const char *row, const int64_t row_bytes) {
#pragma GCC unroll 4
    for (int64_t line = 0; line < row_bytes; line += 64) __builtin_prefetch(row + line, 0, 2);
}

/* Dot products of one query with W keys. */
INLINE vf few_dots(const float *q32, const void *q, const void *k, const int64_t *offsets,
                   const int64_t dim, const int bf16) {
    vf acc[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) acc[j] = splat(0);
#if HAVE_DOT_BF16
    if (bf16) {
        (void)q32;
#pragma GCC unroll 4
        for (int64_t d = 0; d < dim; d += 2 * W) {
            vu x = load_pairs((const uint16_t *)q + d, dim - d);
#pragma GCC unroll 16
            for (int j = 0; j < W; j++)
                acc[j] = dot_bf16(acc[j], x,
                                  load_pairs((const uint16_t *)k + offsets[j] + d, dim - d));
        }
        return sum_each(acc);
    }
#endif
    (void)q;
#pragma GCC unroll 4
    for (int64_t d = 0; d < dim; d += W) {
        vf x = load(q32 + d);
#pragma GCC unroll 16
        for (int j = 0; j < W; j++) acc[j] += x * load_any(k, offsets[j] + d, bf16);
    }
    return sum_each(acc);
}

/* acc[r][d ..] = acc * alpha + sum over keys of p[r][key] * value[key][d ..], `vecs` vectors. */
INLINE void few_values(float *acc, const float *alpha, const float (*p)[FEW_KEYS],
                       const FewRun *run, int64_t d, const int64_t dim, const int rows,
                       const int vecs, const int bf16) {
    vf sums[4][4];
    const int64_t size = bf16 ? 2 : 4;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < vecs; c++) sums[r][c] = load(acc + r * dim + d + c * W) * alpha[r];
    for (int64_t j = 0; j < run->n; j++) {
        few_prefetch(run->next_v + (run->next_offsets[j] + d) * size, vecs * W * size);
#pragma GCC unroll 4
        for (int c = 0; c < vecs; c++) {
            vf x = load_any(run->v, run->offsets[j] + d + c * W, bf16);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sums[r][c] += x * p[r][j];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < vecs; c++) store(acc + r * dim + d + c * W, sums[r][c]);
}

/* few_values over all of head_dim for a fixed number of rows. */
INLINE void few_values_rows(float *acc, const float *alpha, const float (*p)[FEW_KEYS],
                            const FewRun *run, const int64_t dim, const int rows, const int bf16) {
    int64_t d = 0;
    for (; d + 4 * W <= dim; d += 4 * W) few_values(acc, alpha, p, run, d, dim, rows, 4, bf16);
    for (; d + 2 * W <= dim; d += 2 * W) few_values(acc, alpha, p, run, d, dim, rows, 2, bf16);
    for (; d < dim; d += W) few_values(acc, alpha, p, run, d, dim, rows, 1, bf16);
}

/* Turn one row's scores into exp(score - max); returns the factor for what came before. */
INLINE float few_softmax(FewState *state, int64_t r, float *s, Range seen, int64_t key0,
                         int64_t n) {
    int64_t first = max64(seen.lo - key0, 0), last = min64(seen.hi - key0, n);
    for (int64_t j = 0; j < first && j < FEW_KEYS; j++) s[j] = -INFINITY;
    for (int64_t j = max64(last, 0); j < FEW_KEYS; j++) s[j] = -INFINITY;
    vf best = load(s);
    for (int j = W; j < FEW_KEYS; j += W) best = vmax(best, load(s + j));
    float m = fmaxf(state->m[r], max_lane(best));
    vf total = splat(0);
    for (int j = 0; j < FEW_KEYS; j += W) {
        vf p = vexp(load(s + j) - m);
        total += p;
        store(s + j, p);
    }
    float alpha = expf(state->m[r] - m);
    state->m[r] = m;
    state->l[r] = state->l[r] * alpha + sum(total);
    return alpha;
}

/* Weights of one row for a run of keys; returns the factor for what came before. */
INLINE float few_weights(const Args *a, const FewRun *run, FewState *state, int64_t r,
                         const float *q32, const char *q, float *p, Range seen, const int64_t dim,
                         const int bf16) {
    const int64_t size = bf16 ? 2 : 4;
    for (int64_t j = 0; j < run->n; j += W) {
        for (int i = 0; r == 0 && i < W; i++)
            few_prefetch(run->next_k + run->next_offsets[j + i] * size, dim * size);
        store(p + j, to_scores(a, few_dots(q32, q, run->k, run->offsets + j, dim, bf16)));
    }
    return few_softmax(state, r, p, seen, run->key0, run->n);
}

/* One KV head's rows against one run. */
INLINE void few_run(const Args *a, const Item *it, int64_t head, const FewRun *run,
                    FewState *state, const float *q32, float *acc, const Range *seen,
                    const int64_t dim, const int bf16) {
    float p[FEW_ROWS][FEW_KEYS] __attribute__((aligned(64)));
    float alpha[FEW_ROWS];
    int64_t r = 0;
    for (; r < it->rows; r++) {
        int64_t from = query_offset(a, it->seq, head, it->row0 + r) * (bf16 ? 2 : 4);
        alpha[r] = few_weights(a, run, state, r, q32 + r * dim, (const char *)a->q + from, p[r],
                               seen[r], dim, bf16);
    }
    for (r = 0; r + 4 <= it->rows; r += 4)
        few_values_rows(acc + r * dim, alpha + r, p + r, run, dim, 4, bf16);
    int64_t rest = it->rows - r;
    acc += r * dim;
    if (rest == 3) few_values_rows(acc, alpha + r, p + r, run, dim, 3, bf16);
    if (rest == 2) few_values_rows(acc, alpha + r, p + r, run, dim, 2, bf16);
    if (rest == 1) few_values_rows(acc, alpha + r, p + r, run, dim, 1, bf16);
}

/* Queries as fp32 rows; state and sums as before the first key. */
static void few_start(const Args *a, const Item *it, FewState *state, float *q32, float *acc) {
    int64_t dim = a->head_dim, heads = it->head1 - it->head0;
    memset(acc, 0, (size_t)(heads * it->rows * dim) * sizeof *acc);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t r = 0; r < it->rows; r++) {
            int64_t from = query_offset(a, it->seq, it->head0 + h, it->row0 + r);
            state[h].m[r] = NO_SCORE;
            state[h].l[r] = 0;
            for (int64_t d = 0; d < dim; d += W)
                store(q32 + (h * it->rows + r) * dim + d, load_any(a->q, from + d, a->kv_bf16));
        }
}

/* Offsets of a run of keys; the last repeats, so that every load is of a live key. */
INLINE void few_offsets(const Args *a, const Item *it, int64_t key0, int64_t *offsets) {
    int64_t n = max64(0, min64(FEW_KEYS, it->key1 - key0));
    for (int64_t j = 0; j < n; j++) offsets[j] = key_offset(a, it->seq, key0 + j);
    for (int64_t j = n; j < FEW_KEYS; j++) offsets[j] = n ? offsets[n - 1] : 0;
}

/* Where one head's keys are: after the last head's come the first head's of the next run. */
INLINE FewRun few_turn(const Args *a, const Item *it, int64_t head, const int64_t *offsets,
                       const int64_t *after, const int bf16) {
    const int64_t size = bf16 ? 2 : 4, stride = head_stride(a) * size;
    const int last = head + 1 == it->head1;
    FewRun run = {.k = (const char *)a->kv + head * stride, .offsets = offsets};
    run.next_k = run.k + (last ? it->head0 - head : 1) * stride;
    run.next_offsets = last ? after : offsets;
    run.v = run.k + value_stride(a) * size;
    run.next_v = run.next_k + value_stride(a) * size;
    return run;
}

INLINE void few_rows_body(const Args *a, const Item *it, FewState *state, float *q32, float *acc,
                          const int64_t dim, const int bf16) {
    Range seen[FEW_ROWS];
    int64_t runs[2][FEW_KEYS], group = group_of(a);
    for (int64_t r = 0; r < it->rows; r++) {
        seen[r] = visible_to(a, it->seq, (it->row0 + r) / group);
        seen[r].hi = min64(seen[r].hi, it->key1);
    }
    few_start(a, it, state, q32, acc);
    few_offsets(a, it, it->key0, runs[0]);
    for (int64_t key = it->key0, turn = 0; key < it->key1; key += FEW_KEYS, turn ^= 1) {
        few_offsets(a, it, key + FEW_KEYS, runs[!turn]);
        for (int64_t h = 0; h < it->head1 - it->head0; h++) {
            FewRun run = few_turn(a, it, it->head0 + h, runs[turn], runs[!turn], bf16);
            run.key0 = key;
            run.n = min64(FEW_KEYS, it->key1 - key);
            few_run(a, it, it->head0 + h, &run, state + h, q32 + h * it->rows * dim,
                    acc + h * it->rows * dim, seen, dim, bf16);
        }
    }
}

/* Run one item over its KV heads. */
static void few_rows(const Args *a, const Item *it, float *scratch, float *parts) {
    int64_t dim = a->head_dim, heads = it->head1 - it->head0;
    FewState *state = (FewState *)scratch;
    float *q32 = scratch + heads * (int64_t)(sizeof(FewState) / sizeof(float));
    float *acc = q32 + heads * it->rows * dim;
    if (a->kv_bf16 && dim == 64)
        few_rows_body(a, it, state, q32, acc, 64, 1);
    else if (a->kv_bf16 && dim == 128)
        few_rows_body(a, it, state, q32, acc, 128, 1);
    else if (a->kv_bf16)
        few_rows_body(a, it, state, q32, acc, dim, 1);
    else if (dim == 64)
        few_rows_body(a, it, state, q32, acc, 64, 0);
    else
        few_rows_body(a, it, state, q32, acc, dim, 0);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t r = 0; r < it->rows; r++)
            emit_row(a, it, it->head0 + h, r, acc + (h * it->rows + r) * dim, state[h].m[r],
                     state[h].l[r], parts);
}

#endif
