/* SPDX-License-Identifier: Apache-2.0 */
/* read_rows.h -- rows of bytes of a file copied into memory.
 *
 * Rows of some length are read one by one; shorter ones are copied out of the mapped
 * file, which saves a system call for each. Bytes beside the rows are not copied. */
#ifndef TP_READ_ROWS_H
#define TP_READ_ROWS_H

#include <stdint.h>

#include "core/base/error.h"

/* `rows` rows of `bytes`, `stride` apart from `begin` on in the file, and `out_stride`
 * apart in memory. */
typedef struct {
    int64_t begin;
    int64_t rows;
    int64_t bytes;
    int64_t stride;
    int64_t out_stride;
} tp_rows;

/* Read from an open file; `path` is for messages. Fails with TP_VALUE where the file
 * ends before the rows do, or cannot be read. The caller has seen to it that `out` has
 * room and that nothing overflows. */
int tp_read_rows(int fd, const char *path, const tp_rows *rows, void *out,
                 tp_error *err);

#endif
