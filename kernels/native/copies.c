/* Copying rows of bytes between two tables: one call for many blocks.
 *
 * Large rows are written past the caches (streaming stores): the bytes of a destination need not be
 * read first, which is a third of the traffic of a copy, and what the model keeps in the caches
 * stays there.
 */
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

enum { LINE = 64, AHEAD = 16 * LINE, LARGE = 4096 };

#if defined(__AVX__)
/* Copies `num_bytes`, a multiple of a line, to `dst`, which a line starts at. */
static void stream_lines(char *dst, const char *src, int64_t num_bytes) {
    for (int64_t at = 0; at < num_bytes; at += LINE) {
        _mm_prefetch(src + at + AHEAD, _MM_HINT_NTA);
        const __m256i low = _mm256_loadu_si256((const __m256i *)(src + at));
        const __m256i high = _mm256_loadu_si256((const __m256i *)(src + at + LINE / 2));
        _mm256_stream_si256((__m256i *)(dst + at), low);
        _mm256_stream_si256((__m256i *)(dst + at + LINE / 2), high);
    }
}

static void copy(char *dst, const char *src, int64_t num_bytes) {
    if (num_bytes < LARGE) {
        memcpy(dst, src, (size_t)num_bytes);
        return;
    }
    const int64_t head = -(intptr_t)dst & (LINE - 1);
    const int64_t lines = (num_bytes - head) & ~(int64_t)(LINE - 1);
    memcpy(dst, src, (size_t)head);
    stream_lines(dst + head, src + head, lines);
    memcpy(dst + head + lines, src + head + lines, (size_t)(num_bytes - head - lines));
}

/* Others see the rows once this has returned. */
static void publish(void) { _mm_sfence(); }
#else
static void copy(char *dst, const char *src, int64_t num_bytes) {
    memcpy(dst, src, (size_t)num_bytes);
}

static void publish(void) {}
#endif

/* Row dst_ids[i] becomes row src_ids[i]; runs of neighbours on both sides are one copy where rows
 * have no gaps. Returns 1, and copies nothing, if an id names no row. */
int tierkv_copy_rows(char *dst, const char *src, const int64_t *dst_ids, const int64_t *src_ids,
                     int64_t count, int64_t num_bytes, int64_t dst_stride, int64_t src_stride,
                     int64_t dst_rows, int64_t src_rows) {
    for (int64_t i = 0; i < count; i++)
        if (dst_ids[i] < 0 || dst_ids[i] >= dst_rows || src_ids[i] < 0 || src_ids[i] >= src_rows)
            return 1;
    const int is_dense = dst_stride == num_bytes && src_stride == num_bytes;
    for (int64_t i = 0, run; i < count; i += run) {
        for (run = 1; is_dense && i + run < count; run++)
            if (dst_ids[i + run] != dst_ids[i] + run || src_ids[i + run] != src_ids[i] + run) break;
        copy(dst + dst_ids[i] * dst_stride, src + src_ids[i] * src_stride, run * num_bytes);
    }
    publish();
    return 0;
}
