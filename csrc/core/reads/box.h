/* SPDX-License-Identifier: Apache-2.0 */
/* box.h -- a slice of a tensor in a file as rows of bytes.
 *
 * A box is a start and a length for each dimension of a tensor whose elements lie in
 * order. What lies side by side both in the file and where it goes is one row; rows at
 * equal distances are one read. Knows no file and reads nothing. */
#ifndef TP_BOX_H
#define TP_BOX_H

#include <stdint.h>

#include "base/error.h"
#include "base/limits.h"

/* `begin` is the place of the tensor in its file, in bytes. Where the box goes is a
 * memory with `out_begin` and `out_strides`, in elements. */
typedef struct {
    int file;
    int dims;
    int64_t begin;
    int64_t item;
    int64_t shape[TP_MAX_DIMS];
    int64_t starts[TP_MAX_DIMS];
    int64_t lengths[TP_MAX_DIMS];
    int64_t out_begin;
    int64_t out_strides[TP_MAX_DIMS];
} tp_box;

/* `rows` rows of `row_bytes`, `stride` apart in the file from `begin` on, and
 * `out_stride` apart from `out_begin` on where they go. In bytes. */
typedef struct {
    int box; /* which of several this is of */
    int file;
    int64_t begin;
    int64_t rows;
    int64_t row_bytes;
    int64_t stride;
    int64_t out_begin;
    int64_t out_stride;
} tp_read;

typedef struct {
    tp_read *items; /* owned */
    int64_t count;
    int64_t room;
} tp_reads;

#define TP_NO_READS \
    {               \
        NULL, 0, 0  \
    }

/* Append the reads of `box`, which is number `index`, in the order of the file. None
 * for a box without elements. Fails with TP_VALUE where it is not within its tensor, or
 * for a tensor of 2^63 bytes or more. */
int tp_box_reads(const tp_box *box, int index, tp_reads *reads, tp_error *err);

void tp_reads_clear(tp_reads *reads);

#endif
