/* Vectors of W floats for whatever the compiler targets, in GNU C vector extensions.
 *
 * The same source serves AVX-512, AVX2, NEON and plain SSE; only what the extensions cannot say
 * (maximum, bf16 dot products) is written with intrinsics, each with a portable twin.
 */
#ifndef TIERKV_VEC_H
#define TIERKV_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define W 16
#elif defined(__AVX__)
#include <immintrin.h>
#define W 8
#else
#define W 4
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_DOT_BF16 1
#else
#define HAVE_DOT_BF16 0
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf load(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(float *p, vf x) { memcpy(p, &x, sizeof x); }

/* The 32 bits at p, in every lane. */
INLINE vf splat_bits(const float *p) {
    uint32_t bits;
    memcpy(&bits, p, 4);
    return (vf)(bits - (vu){0});
}

INLINE vf load_bf16(const uint16_t *p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return (vf)(__builtin_convertvector(x, vu) << 16);
}

/* Element `index` and its W - 1 successors of fp32 or bf16 data, as fp32. */
INLINE vf load_any(const void *p, int64_t index, int bf16) {
    return bf16 ? load_bf16((const uint16_t *)p + index) : load((const float *)p + index);
}

INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Lanes of a where the mask is all ones, of b where it is zero. */
INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE vf vmax(vf a, vf b) {
#if W == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif W == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}

/* exp(x) to 2 ulp for x <= 0; below -87 (where -inf, the masked score, is) exactly 0. */
INLINE vf vexp(vf x) {
    vf floor = splat(-87.0f);
    vi dead = x <= floor;
    x = vmax(floor, x);
    vf shifter = splat(12582912.0f);
    vf n = x * 1.44269504088896341f + shifter;
    vi exponent = (vi)n;
    n -= shifter;
    vf r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    vf y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y = (vf)((vi)y + (exponent << 23));
    return (vf)((vi)y & ~dead);
}

/* softcap * tanh(x / softcap), through exp of a negative number so that it cannot overflow. */
INLINE vf vsoftcap(vf x, float softcap) {
    vi sign = (vi)x & (vi)splat(-0.0f);
    vf magnitude = (vf)((vi)x & ~(vi)splat(-0.0f)) / splat(softcap);
    vf e = vexp(-2.0f * magnitude);
    return (vf)((vi)(softcap * (1.0f - e) / (1.0f + e)) | sign);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* Sums of neighbours: a's pairs, then b's. */
INLINE vf add_pairs(vf a, vf b) {
#if W == 16
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif W == 8
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

/* Lane i of the result is the sum over the lanes of x[i]; destroys x. */
INLINE vf sum_each(vf x[W]) {
#pragma GCC unroll 4
    for (int n = W / 2; n >= 1; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) x[i] = add_pairs(x[2 * i], x[2 * i + 1]);
    return x[0];
}

/* a's and b's elements in turn: of their first halves, of their second halves. */
INLINE vf weave_low(vf a, vf b) {
#if W == 16
    return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif W == 8
    return SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

INLINE vf weave_high(vf a, vf b) {
#if W == 16
    return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif W == 8
    return SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

/* x[i][j] becomes x[j][i]: weaving row i with row i + W / 2, log2(W) times. */
INLINE void transpose(vf x[W]) {
    vf y[W];
#pragma GCC unroll 4
    for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; i++) {
            y[2 * i] = weave_low(x[i], x[i + W / 2]);
            y[2 * i + 1] = weave_high(x[i], x[i + W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = y[i];
    }
}

INLINE float sum(vf x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}

INLINE float max_lane(vf x) {
    float best = x[0];
    for (int i = 1; i < W; i++) best = x[i] > best ? x[i] : best;
    return best;
}

#if HAVE_DOT_BF16
/* acc[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1] for 32 bf16 values each. */
INLINE vf dot_bf16(vf acc, vu a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}

/* Up to 32 bf16 values from p; the ones past `count` are zero and not read. */
INLINE vu load_pairs(const uint16_t *p, int64_t count) {
    __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1;
    return (vu)_mm512_maskz_loadu_epi16(mask, p);
}

/* Lane i holds low[i] and high[i] rounded to bf16, as a pair. */
INLINE vu pack_pairs(vf low, vf high) {
    vu l = (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)low));
    vu h = (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)high));
    return l | (h << 16);
}
#endif

#endif
