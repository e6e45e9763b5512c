/* SPDX-License-Identifier: Apache-2.0 */
/* box.c -- a slice of a tensor in a file as rows of bytes. */
#include "reads/box.h"

#include <stdbool.h>
#include <stdlib.h>

/* A box from outside in: `outer` dimensions that are counted through, at most one of
 * rows, and the dimensions within a row. */
typedef struct {
    int64_t strides[TP_MAX_DIMS]; /* of the tensor, in elements */
    int outer;
    int64_t rows;
    int64_t row; /* elements of a row */
    int64_t stride;
    int64_t out_stride;
} layout;

static int
check_out(const tp_box *box, tp_error *err)
{
    int64_t end = box->out_begin, last = 0;
    bool overflows = box->out_begin < 0;
    for (int dim = 0; dim < box->dims; dim++)
        overflows =
            overflows || box->out_strides[dim] < 0 ||
            __builtin_mul_overflow(box->lengths[dim], box->out_strides[dim], &last) ||
            __builtin_add_overflow(end, last, &end);
    if (overflows || __builtin_mul_overflow(end, box->item, &end))
        return tp_fail(err, TP_VALUE,
                       "the place of a slice has a negative stride, or 2^63 bytes or "
                       "more");
    return 0;
}

static int
check(const tp_box *box, layout *at, tp_error *err)
{
    int64_t size = box->item;
    if (box->dims < 0 || box->dims > TP_MAX_DIMS || box->item <= 0 || box->begin < 0)
        return tp_fail(err, TP_VALUE, "a box has 0 to %d dimensions, here %d",
                       TP_MAX_DIMS, box->dims);
    for (int dim = box->dims - 1; dim >= 0; dim--) {
        const int64_t start = box->starts[dim], length = box->lengths[dim];
        at->strides[dim] = size / box->item;
        if (start < 0 || length < 0 || box->shape[dim] < 0 ||
            start > box->shape[dim] - length)
            return tp_fail(err, TP_VALUE,
                           "dimension %d of a tensor has %lld elements, but %lld from "
                           "%lld on are to be read",
                           dim, (long long)box->shape[dim], (long long)length,
                           (long long)start);
        if (__builtin_mul_overflow(size, box->shape[dim], &size))
            return tp_fail(err, TP_VALUE, "a tensor has 2^63 bytes or more");
    }
    if (__builtin_add_overflow(size, box->begin, &size))
        return tp_fail(err, TP_VALUE, "a tensor ends beyond 2^63 bytes");
    return check_out(box, err);
}

static bool
is_empty(const tp_box *box)
{
    for (int dim = 0; dim < box->dims; dim++)
        if (box->lengths[dim] == 0)
            return true;
    return false;
}

/* What is side by side in the file and where it goes is a row; the dimension around it
 * gives the rows, and so do those around that at the same distances. */
static void
lay_out(const tp_box *box, layout *at)
{
    int dim = box->dims - 1;
    at->row = 1;
    for (; dim >= 0; dim--) {
        if (box->lengths[dim] == 1)
            continue;
        if (at->strides[dim] != at->row || box->out_strides[dim] != at->row)
            break;
        at->row *= box->lengths[dim];
    }
    at->rows = 1;
    at->stride = at->out_stride = at->row;
    if (dim >= 0) {
        at->rows = box->lengths[dim];
        at->stride = at->strides[dim];
        at->out_stride = box->out_strides[dim];
        dim--;
    }
    for (; dim >= 0; dim--) {
        if (box->lengths[dim] == 1)
            continue;
        if (at->strides[dim] != at->stride * at->rows ||
            box->out_strides[dim] != at->out_stride * at->rows)
            break;
        at->rows *= box->lengths[dim];
    }
    at->outer = dim + 1;
}

static int
append(tp_reads *reads, const tp_read *read, tp_error *err)
{
    if (reads->count == reads->room) {
        const int64_t room = reads->room > 0 ? 2 * reads->room : 64;
        tp_read *items = realloc(reads->items, (size_t)room * sizeof(*items));
        if (items == NULL)
            return tp_fail_memory(err);
        reads->items = items;
        reads->room = room;
    }
    reads->items[reads->count++] = *read;
    return 0;
}

int
tp_box_reads(const tp_box *box, int index, tp_reads *reads, tp_error *err)
{
    layout at;
    int64_t counter[TP_MAX_DIMS] = {0};
    if (check(box, &at, err) < 0)
        return -1;
    if (is_empty(box))
        return 0;
    lay_out(box, &at);
    int64_t first = 0;
    for (int dim = 0; dim < box->dims; dim++)
        first += box->starts[dim] * at.strides[dim];
    for (;;) {
        int64_t from = first, to = box->out_begin;
        for (int dim = 0; dim < at.outer; dim++) {
            from += counter[dim] * at.strides[dim];
            to += counter[dim] * box->out_strides[dim];
        }
        const tp_read read = {
            index,
            box->file,
            box->begin + from * box->item,
            at.rows,
            at.row * box->item,
            at.stride * box->item,
            to * box->item,
            at.out_stride * box->item,
        };
        if (append(reads, &read, err) < 0)
            return -1;
        int dim = at.outer - 1;
        while (dim >= 0 && ++counter[dim] == box->lengths[dim])
            counter[dim--] = 0;
        if (dim < 0)
            return 0;
    }
}

void
tp_reads_clear(tp_reads *reads)
{
    free(reads->items);
    *reads = (tp_reads)TP_NO_READS;
}
