/* Paged attention and KV writes on CPU, for cpu_native.py to compile and call.
 *
 * A call becomes items: a sequence's rows, some KV heads, a range of keys. Short of parallelism
 * (one long decode) a sequence's keys are split, and the parts merged by their normalisers.
 */
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "few_rows.h"
#include "many_rows.h"
#include "step.h"

#define MIN_SPLIT 256       /* fewer keys than this are not worth a part of their own */
#define MIN_PARALLEL 4096   /* less cost than this (some 30 us) is not worth waking threads for */

typedef struct {
    Item *items;
    int64_t count, capacity, parts; /* parts: floats that partial results take */
    int64_t cost;                   /* of all items */
    int64_t split;                  /* most keys of one item whose keys can be shared out */
    int failed;
} Plan;

static void push(Plan *plan, Item item) {
    if (plan->count == plan->capacity) {
        int64_t capacity = plan->capacity ? 2 * plan->capacity : 64;
        Item *items = realloc(plan->items, (size_t)capacity * sizeof *items);
        if (!items) {
            plan->failed = 1;
            return;
        }
        plan->items = items;
        plan->capacity = capacity;
    }
    item.cost = item.rows * (item.head1 - item.head0) * (item.key1 - item.key0);
    plan->cost += item.cost;
    plan->items[plan->count++] = item;
}

/* Rows [row0, row0 + rows) of some heads: one item, or several that share out its keys. */
static void push_split(const Args *a, Plan *plan, Item item) {
    int64_t keys = item.key1 - item.key0, begin = item.key0, end = item.key1;
    int64_t pieces = keys > plan->split ? (keys + plan->split - 1) / plan->split : 1;
    if (pieces == 1) {
        push(plan, item);
        return;
    }
    int64_t step = ((keys + pieces - 1) / pieces + W - 1) / W * W;
    for (item.key0 = begin; item.key0 < end; item.key0 = item.key1) {
        item.key1 = min64(end, item.key0 + step);
        item.part = plan->parts;
        plan->parts += (item.head1 - item.head0) * item.rows * (a->head_dim + 2);
        push(plan, item);
    }
}

static int is_few(int64_t rows) { return rows <= FEW_ROWS; }

/* The keys that any of the item's rows sees. */
static void set_keys(const Args *a, Item *item) {
    int64_t group = group_of(a), last = (item->row0 + item->rows - 1) / group;
    item->key0 = visible_to(a, item->seq, item->row0 / group).lo;
    item->key1 = max64(item->key0, visible_to(a, item->seq, last).hi);
}

static void plan_seq(const Args *a, Plan *plan, int64_t seq) {
    int64_t queries = a->query_start[seq + 1] - a->query_start[seq];
    int64_t rows = queries * group_of(a);
    if (is_few(rows)) {
        Item item = {seq, 0, a->num_kv_heads, 0, rows, 0, 0, -1, 0};
        set_keys(a, &item);
        push_split(a, plan, item);
        return;
    }
    for (int64_t row = 0; row < rows; row += MANY_ROWS)
        for (int64_t head = 0; head < a->num_kv_heads; head++) {
            Item item = {seq, head, head + 1, row, min64(MANY_ROWS, rows - row), 0, 0, -1, 0};
            set_keys(a, &item);
            push_split(a, plan, item);
        }
}

/* The longest stretch of keys one item may have if every thread is to get several items. */
static int64_t longest_split(const Args *a) {
    int64_t total = 0;
    if (a->num_threads <= 1) return INT64_MAX;
    for (int64_t seq = 0; seq < a->num_seqs; seq++) {
        int64_t queries = a->query_start[seq + 1] - a->query_start[seq];
        int64_t rows = queries * group_of(a);
        int64_t items = is_few(rows) ? 1 : (rows + MANY_ROWS - 1) / MANY_ROWS * a->num_kv_heads;
        total += items * a->key_lens[seq];
    }
    return max64(MIN_SPLIT, total / (4 * a->num_threads));
}

static int longest_first(const void *x, const void *y) {
    int64_t a = ((const Item *)x)->cost, b = ((const Item *)y)->cost;
    return a < b ? 1 : a > b ? -1 : 0;
}

static Item *copy_items(const Plan *plan) {
    Item *sorted = malloc((size_t)plan->count * sizeof *sorted);
    if (!sorted) return NULL;
    memcpy(sorted, plan->items, (size_t)plan->count * sizeof *sorted);
    qsort(sorted, (size_t)plan->count, sizeof *sorted, longest_first);
    return sorted;
}

static void run_item(const Args *a, const Item *item, float *scratch, float *parts) {
    if (is_few((a->query_start[item->seq + 1] - a->query_start[item->seq]) * group_of(a)))
        few_rows(a, item, scratch, parts);
    else
        many_rows(a, item, scratch, parts);
}

/* Scratch of the calling thread, 64-byte aligned, kept for the next call. */
static float *thread_scratch(int64_t floats) {
    static _Thread_local float *buffer;
    static _Thread_local int64_t size;
    if (size < floats) {
        free(buffer);
        buffer = aligned_alloc(64, (size_t)((floats * 4 + 63) / 64 * 64));
        size = buffer ? floats : 0;
    }
    return buffer;
}

/* Combine consecutive parts of one row set: items first .. last - 1 differ in their keys only. */
static void merge_parts(const Args *a, const Item *first, const Item *last, const float *parts,
                        float *acc) {
    int64_t dim = a->head_dim, rows = first->rows * (first->head1 - first->head0);
    for (int64_t r = 0; r < rows; r++) {
        float m = NO_SCORE, l = 0;
        memset(acc, 0, (size_t)dim * sizeof *acc);
        for (const Item *it = first; it < last; it++)
            m = fmaxf(m, parts[it->part + r * (dim + 2) + dim]);
        for (const Item *it = first; it < last; it++) {
            const float *part = parts + it->part + r * (dim + 2);
            float weight = expf(part[dim] - m);
            for (int64_t d = 0; d < dim; d++) acc[d] += weight * part[d];
            l += weight * part[dim + 1];
        }
        finish_row(a, first->seq, first->head0 + r / first->rows, first->row0 + r % first->rows,
                   acc, m, l);
    }
}

static void merge_all(const Args *a, const Plan *plan, const float *parts, float *acc) {
    const Item *end = plan->items + plan->count;
    for (const Item *first = plan->items, *last; first < end; first = last) {
        for (last = first + 1; last < end && last->seq == first->seq && last->part >= 0 &&
                               last->row0 == first->row0 && last->head0 == first->head0;)
            last++;
        if (first->part >= 0) merge_parts(a, first, last, parts, acc);
    }
}

static int run_plan(const Args *a, const Plan *plan, const Item *sorted, float *parts) {
    int64_t few = few_rows_scratch(a->num_kv_heads, FEW_ROWS, a->head_dim);
    int64_t floats = max64(few, many_rows_scratch(a->head_dim));
    int failed = 0;
    const int parallel = plan->count > 1 && plan->cost >= MIN_PARALLEL;
    (void)parallel; /* read by OpenMP only */
#pragma omp parallel num_threads(a->num_threads) reduction(| : failed) if (parallel)
    {
        float *scratch = thread_scratch(floats);
        failed = !scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < plan->count; i++)
            if (scratch) run_item(a, sorted + i, scratch, parts);
    }
    if (!failed && plan->parts) merge_all(a, plan, parts, thread_scratch(floats));
    return failed;
}

/* Fill out and lse; returns 0, or 1 when memory ran out. */
int tierkv_attention(const Args *a) {
    Plan plan = {0};
    plan.split = longest_split(a);
    for (int64_t seq = 0; seq < a->num_seqs; seq++) plan_seq(a, &plan, seq);
    Item *sorted = plan.count ? copy_items(&plan) : NULL;
    float *parts = plan.parts ? malloc((size_t)plan.parts * sizeof *parts) : NULL;
    int failed = plan.failed || (plan.count && !sorted) || (plan.parts && !parts);
    if (!failed && plan.count) failed = run_plan(a, &plan, sorted, parts);
    free(parts);
    free(sorted);
    free(plan.items);
    return failed;
}

/* k and v: rows with strides in bytes; sizes in bytes. Returns 1 on a slot outside kv. */
int tierkv_write_kv(char *kv, const char *k, const char *v, const int64_t *slots, int64_t tokens,
                    int64_t num_blocks, int64_t heads, int64_t block_size, int64_t row_bytes,
                    int64_t block_bytes, const int64_t *strides, int32_t num_threads) {
    int64_t head_bytes = block_size * row_bytes, failed = 0;
#pragma omp parallel for num_threads(num_threads) reduction(| : failed) if (tokens >= 128)
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        if (slots[t] >= num_blocks * block_size) {
            failed = 1;
            continue;
        }
        char *to = kv + slots[t] / block_size * block_bytes + slots[t] % block_size * row_bytes;
        for (int64_t h = 0; h < heads; h++, to += head_bytes) {
            memcpy(to, k + t * strides[0] + h * strides[1], (size_t)row_bytes);
            memcpy(to + heads * head_bytes, v + t * strides[2] + h * strides[3], (size_t)row_bytes);
        }
    }
    return (int)failed;
}
