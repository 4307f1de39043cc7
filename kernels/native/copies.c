/* Copying rows of bytes between two tables: one call for many blocks. */
#include <stdint.h>
#include <string.h>

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
        memcpy(dst + dst_ids[i] * dst_stride, src + src_ids[i] * src_stride,
               (size_t)(run * num_bytes));
    }
    return 0;
}
