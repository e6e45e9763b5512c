/* SPDX-License-Identifier: Apache-2.0 */
/* spec.h -- what a rule asks for: how one weight is sharded and its collectives.
 *
 * A specification is checked without a weight here; whether it fits a certain weight
 * is decided in view.c and resolve.c. */
#ifndef TP_SPEC_H
#define TP_SPEC_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "base/limits.h"

#define TP_MAX_PIECES 64

typedef enum {
    TP_PARTITION_COLUMN, /* output features; of an embedding, the hidden dimension */
    TP_PARTITION_ROW,    /* input features; of an embedding, the vocabulary */
    TP_PARTITION_SKIP    /* stays replicated */
} tp_partition;

/* How a weight is to be seen before it is sharded: DeepSpeed's `shape` with at
 * most one level of nesting. `[2, -1]` is two equal pieces along dim 0,
 * `[[q, k, v], -1]` three unequal ones, `[E, -1, H]` with dim 1 a 3-D view.
 * The count of equal pieces, when the view has the rank of the weight, is
 * sizes[dim]; -1 is inferred. The place of the list holds 0 in `sizes`. */
typedef struct {
    int dims; /* 0: no shape was given */
    int64_t sizes[TP_MAX_DIMS];
    int pieces; /* > 0: sizes[dim] was a list, of this length */
    int64_t piece[TP_MAX_PIECES];
} tp_shape;

typedef struct {
    tp_partition partition;
    int dim; /* sharded dimension of the (viewed) weight; -1: by `partition` */
    tp_shape shape;
    bool gather_output; /* column: every rank gets the full output */
    bool split_input;   /* row: the input is full, take the own shard of it */
    bool sum_gradient;  /* skip: the gradient is partial on every rank */
} tp_spec;

#define TP_NO_SPEC                                                     \
    {                                                                  \
        TP_PARTITION_COLUMN, -1, {0, {0}, 0, {0}}, false, false, false \
    }

/* "column", "row", "skip", in any case. Fails with TP_VALUE naming `where` and the
 * nearest. */
int tp_partition_parse(const char *name, const char *where, tp_partition *out,
                       tp_error *err);

/* "column", "row", "skip". */
const char *tp_partition_name(tp_partition partition);

/* Check a spec without a weight: `dim` in range, sizes positive or -1, the list of
 * pieces at `dim`, flags that fit the partition (gather_output needs column,
 * split_input row, sum_gradient skip), neither dim nor shape for a skip. Fails with
 * TP_VALUE, the message starting with `where`. */
int tp_spec_check(const tp_spec *spec, const char *where, tp_error *err);

#endif
