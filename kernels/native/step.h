/* What the two attention paths share: the call's arguments, a unit of work, a finished row.
 *
 * The query heads that read one KV head are folded into rows: with `group` query heads to a KV
 * head, folded row r of a sequence is query r / group of head `kv_head * group + r % group`.
 */
#ifndef TIERKV_STEP_H
#define TIERKV_STEP_H

#include "vec.h"

#define NO_SCORE (-1e30f) /* the running maximum before any key; finite, so differences are too */

typedef struct { /* mirrored by _Args in cpu_native.py; strides count elements */
    const void *q, *kv;
    void *out;
    float *lse;         /* or NULL */
    const float *sinks; /* or NULL */
    const int64_t *query_start, *context_lens, *key_start, *key_lens, *block_tables;
    int64_t table_stride, num_seqs, num_heads, num_kv_heads, head_dim, block_size;
    int64_t q_stride_token, q_stride_head, kv_stride_block;
    int64_t window; /* 0: none */
    float scale, softcap; /* softcap 0: none */
    int32_t kv_bf16, out_bf16, num_threads;
} Args;

typedef struct {
    int64_t seq, head0, head1; /* KV heads head0 .. head1 - 1 */
    int64_t row0, rows;        /* folded rows */
    int64_t key0, key1;        /* keys, counted from the block table's first */
    int64_t part;              /* where in the parts its rows go, -1 when they are the whole */
    int64_t cost;              /* row-keys, to start long items first */
} Item;

typedef struct { /* the keys one row sees: lo <= key < hi */
    int64_t lo, hi;
} Range;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE int64_t group_of(const Args *a) { return a->num_heads / a->num_kv_heads; }

/* Keys the sequence's query sees, counted from the block table's first. */
INLINE Range visible_to(const Args *a, int64_t seq, int64_t query) {
    int64_t after = a->context_lens[seq] - a->query_start[seq + 1] + a->query_start[seq] + query +
                    1 - a->key_start[seq];
    Range range = {0, min64(a->key_lens[seq], after)};
    if (a->window) range.lo = max64(0, after - a->window);
    return range;
}

/* Element offset in kv of key `key` of KV head 0. */
INLINE int64_t key_offset(const Args *a, int64_t seq, int64_t key) {
    int64_t size = a->block_size, logical, offset;
    if (size & (size - 1)) {
        logical = key / size;
        offset = key % size;
    } else { /* a power of two, as a rule: a division costs as much as the key's arithmetic */
        logical = key >> __builtin_ctzll((unsigned long long)size);
        offset = key & (size - 1);
    }
    int64_t block = a->block_tables[seq * a->table_stride + logical];
    return block * a->kv_stride_block + offset * a->head_dim;
}

INLINE int64_t head_stride(const Args *a) { return a->block_size * a->head_dim; }
INLINE int64_t value_stride(const Args *a) { return a->num_kv_heads * head_stride(a); }

/* Element offset in q of a folded row. */
INLINE int64_t query_offset(const Args *a, int64_t seq, int64_t kv_head, int64_t row) {
    int64_t group = group_of(a), token = a->query_start[seq] + row / group;
    return token * a->q_stride_token + (kv_head * group + row % group) * a->q_stride_head;
}

/* Scores of W keys from their dot products. */
INLINE vf to_scores(const Args *a, vf dots) {
    dots *= a->scale;
    return a->softcap > 0 ? vsoftcap(dots, a->softcap) : dots;
}

/* Write a finished row from its unnormalised sum `acc`, maximum m and normaliser l. */
static void finish_row(const Args *a, int64_t seq, int64_t kv_head, int64_t row, const float *acc,
                       float m, float l) {
    int64_t group = group_of(a), head = kv_head * group + row % group;
    int64_t index = (a->query_start[seq] + row / group) * a->num_heads + head;
    float factor = 1;
    if (a->sinks) {
        float top = fmaxf(m, a->sinks[head]);
        factor = expf(m - top);
        l = l * factor + expf(a->sinks[head] - top);
        m = top;
    }
    if (a->lse) a->lse[index] = l > 0 ? m + logf(l) : -INFINITY;
    factor = l > 0 ? factor / l : 0;
    float *out32 = (float *)a->out + index * a->head_dim;
    uint16_t *out16 = (uint16_t *)a->out + index * a->head_dim;
    for (int64_t d = 0; d < a->head_dim; d++)
        if (a->out_bf16)
            out16[d] = to_bf16(acc[d] * factor);
        else
            out32[d] = acc[d] * factor;
}

/* Hand over an item's row r: final, or as the part [acc | m | l] that merge_parts combines. */
static void emit_row(const Args *a, const Item *it, int64_t kv_head, int64_t r, const float *acc,
                     float m, float l, float *parts) {
    if (it->part < 0) {
        finish_row(a, it->seq, kv_head, it->row0 + r, acc, m, l);
        return;
    }
    int64_t dim = a->head_dim, index = (kv_head - it->head0) * it->rows + r;
    float *part = parts + it->part + index * (dim + 2);
    memcpy(part, acc, (size_t)dim * sizeof *part);
    part[dim] = m;
    part[dim + 1] = l;
}

#endif
