/* Work on rows between the products: RMS norm, activation times gate, rotary embedding.
 *
 * Arithmetic is fp32. Intermediate results are rounded to the rows' dtype where the model's own
 * modules round, so that the outputs are theirs but for rare last bits.
 */
#include "vec.h"

#define MIN_PARALLEL 65536 /* fewer elements (some 20 us) are not worth waking threads for */

/* bf16 bit patterns, rounded to nearest even. */
INLINE vh bf16_bits(vf x) {
#if HAVE_DOT_BF16
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu bits = (vu)x, nan = (vu)(x != x);
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), vh);
#endif
}

INLINE vf round_to(vf x, const int bf16) {
    return bf16 ? (vf)(__builtin_convertvector(bf16_bits(x), vu) << 16) : x;
}

/* The n <= W elements from `index` on, zeros behind them. */
INLINE vf load_n(const void *p, int64_t index, int64_t n, const int bf16) {
    if (n == W) return load_any(p, index, bf16);
    char part[W * 4] __attribute__((aligned(64))) = {0};
    const int64_t size = bf16 ? 2 : 4;
    memcpy(part, (const char *)p + index * size, (size_t)(n * size));
    return load_any(part, 0, bf16);
}

INLINE void store_n(void *p, int64_t index, vf x, int64_t n, const int bf16) {
    const int64_t size = bf16 ? 2 : 4;
    char *to = (char *)p + index * size;
    vh half = bf16_bits(x);
    const void *from = bf16 ? (const void *)&half : (const void *)&x;
    memcpy(to, from, (size_t)(n * size));
}

/* n normed elements from d on. */
INLINE void norm_at(const char *x, const float *weight, char *out, int64_t d, int64_t n,
                    float factor, const int bf16, const int round_first) {
    vf v = round_to(load_n(x, d, n, bf16) * factor, bf16 && round_first);
    store_n(out, d, v * load_n(weight, d, n, 0), n, bf16);
}

INLINE void norm_row(const char *x, const float *weight, char *out, int64_t dim, float eps,
                     const int bf16, const int round_first) {
    vf squares = splat(0), v;
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
        v = load_n(x, d, W, bf16);
        squares += v * v;
    }
    v = load_n(x, d, dim - d, bf16);
    float factor = 1.0f / sqrtf(sum(squares + v * v) / (float)dim + eps);
    for (d = 0; d + W <= dim; d += W) norm_at(x, weight, out, d, W, factor, bf16, round_first);
    norm_at(x, weight, out, d, dim - d, factor, bf16, round_first);
}

/* out: contiguous rows; x: rows that are x_stride elements apart. */
void tierkv_rms_norm(const char *x, const float *weight, char *out, int64_t rows, int64_t dim,
                     int64_t x_stride, float eps, int32_t bf16, int32_t round_first,
                     int32_t num_threads) {
    const int64_t size = bf16 ? 2 : 4;
#pragma omp parallel for num_threads(num_threads) if (rows > 1 && rows * dim >= MIN_PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const char *row = x + r * x_stride * size;
        char *to = out + r * dim * size;
        if (bf16 && round_first)
            norm_row(row, weight, to, dim, eps, 1, 1);
        else if (bf16)
            norm_row(row, weight, to, dim, eps, 1, 0);
        else
            norm_row(row, weight, to, dim, eps, 0, 0);
    }
}

/* x * sigmoid(x) */
INLINE vf silu(vf x) {
    vi sign = (vi)splat(-0.0f);
    vf e = vexp((vf)((vi)x | sign));
    return x * pick(x < splat(0), e, splat(1)) / (1.0f + e);
}

INLINE vf gelu_tanh(vf x) {
    vf inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + vsoftcap(inner, 1.0f));
}

/* n outputs from d on. */
INLINE void act_at(const char *x, char *out, int64_t d, int64_t n, int64_t dim, const int bf16,
                   const int gelu) {
    vf gate = load_n(x, d, n, bf16);
    vf act = round_to(gelu ? gelu_tanh(gate) : silu(gate), bf16);
    store_n(out, d, act * load_n(x, dim + d, n, bf16), n, bf16);
}

INLINE void act_row(const char *x, char *out, int64_t dim, const int bf16, const int gelu) {
    int64_t d = 0;
    for (; d + W <= dim; d += W) act_at(x, out, d, W, dim, bf16, gelu);
    act_at(x, out, d, dim - d, dim, bf16, gelu);
}

/* x: rows of 2 * dim, the activation's input first; out: contiguous rows of dim. */
void tierkv_act_and_mul(const char *x, char *out, int64_t rows, int64_t dim, int64_t x_stride,
                        int32_t bf16, int32_t gelu, int32_t num_threads) {
    const int64_t size = bf16 ? 2 : 4;
#pragma omp parallel for num_threads(num_threads) if (rows > 1 && rows * dim >= MIN_PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const char *row = x + r * x_stride * size;
        char *to = out + r * dim * size;
        if (bf16 && gelu)
            act_row(row, to, dim, 1, 1);
        else if (bf16)
            act_row(row, to, dim, 1, 0);
        else
            act_row(row, to, dim, 0, gelu);
    }
}

typedef struct { /* mirrored by _Rotary in cpu_native.py; strides count elements */
    const char *x[2], *cos, *sin; /* queries and keys */
    char *out[2];                 /* [tokens, heads, dim] */
    int64_t heads[2], token_stride[2], head_stride[2];
    int64_t tokens, dim, table_stride;
    int32_t bf16, num_threads;
} Rotary;

/* n pairs (d, d + half) of one head, rounded after every operation. */
INLINE void rotate_at(const char *x, const char *cos, const char *sin, char *out, int64_t d,
                      int64_t n, int64_t half, const int bf16) {
    vf low = load_n(x, d, n, bf16), high = load_n(x, half + d, n, bf16);
    vf a = round_to(low * load_n(cos, d, n, bf16), bf16);
    vf b = round_to(high * load_n(sin, d, n, bf16), bf16);
    store_n(out, d, a - b, n, bf16);
    a = round_to(high * load_n(cos, half + d, n, bf16), bf16);
    b = round_to(low * load_n(sin, half + d, n, bf16), bf16);
    store_n(out, half + d, a + b, n, bf16);
}

INLINE void rotate_token(const Rotary *a, int64_t t, const int bf16) {
    const int64_t size = bf16 ? 2 : 4, half = a->dim / 2;
    const char *cos = a->cos + t * a->table_stride * size;
    const char *sin = a->sin + t * a->table_stride * size;
    for (int which = 0; which < 2; which++)
        for (int64_t h = 0; h < a->heads[which]; h++) {
            int64_t from = t * a->token_stride[which] + h * a->head_stride[which], d = 0;
            const char *x = a->x[which] + from * size;
            char *out = a->out[which] + (t * a->heads[which] + h) * a->dim * size;
            for (; d + W <= half; d += W) rotate_at(x, cos, sin, out, d, W, half, bf16);
            if (d < half) rotate_at(x, cos, sin, out, d, half - d, half, bf16);
        }
}

/* Rotary embedding of queries and keys. */
void tierkv_rotate(const Rotary *a) {
    const int64_t elements = a->tokens * a->dim * (a->heads[0] + a->heads[1]);
#pragma omp parallel for num_threads(a->num_threads) if (elements >= MIN_PARALLEL)
    for (int64_t t = 0; t < a->tokens; t++) {
        if (a->bf16)
            rotate_token(a, t, 1);
        else
            rotate_token(a, t, 0);
    }
}
