/* SPDX-License-Identifier: Apache-2.0 */
/* read_plan.h -- in which order many boxes are read, and what of the files they span.
 *
 * Each box is read as a whole, those of a file from front to back. */
#ifndef TP_READ_PLAN_H
#define TP_READ_PLAN_H

#include "reads/box.h"

/* A stretch of a file, of which something is read; `end` is behind it. */
typedef struct {
    int file;
    int64_t begin;
    int64_t end;
} tp_span;

typedef struct {
    tp_reads reads;
    tp_span *spans; /* owned: in order, none of a file touches another */
    int64_t span_count;
    int64_t bytes; /* of all rows */
} tp_read_plan;

#define TP_NO_READ_PLAN         \
    {                           \
        TP_NO_READS, NULL, 0, 0 \
    }

/* Plan the reads of `boxes`. Stretches with at most `gap` bytes between them, 0 or
 * more, are one span. Fails as tp_box_reads; tp_read_plan_clear comes after failure,
 * too. */
int tp_read_plan_make(const tp_box *boxes, int count, int64_t gap, tp_read_plan *plan,
                      tp_error *err);

void tp_read_plan_clear(tp_read_plan *plan);

#endif
