/* SPDX-License-Identifier: Apache-2.0 */
/* chunks.h -- where the elements of a shard are in the full parameter.
 *
 * Along the dimension that shrinks, in the parameter's own shape: a chunk of the shard
 * is a chunk of the full parameter of the same length. Decides nothing, moves nothing.
 */
#ifndef TP_CHUNKS_H
#define TP_CHUNKS_H

#include "plan/plan.h"

typedef struct {
    int64_t from;   /* in the shard, along the dimension that shrinks */
    int64_t at;     /* in the full parameter, along the same dimension */
    int64_t length; /* > 0 */
    bool is_owned;  /* by this rank, the lowest of those that hold it */
} tp_chunk;

/* The chunks that make the shard of `rank` from `begin` up to `end` along the dimension
 * that shrinks, in the order of the shard. Neighbours that are one chunk are one.
 * `*chunks` is the caller's to free, also when it is empty. Fails with TP_VALUE for a
 * replicated parameter and for bounds that are not within the shard. */
int tp_chunks(const tp_plan *plan, int entry, int rank, int64_t begin, int64_t end,
              tp_chunk **chunks, int *count, tp_error *err);

#endif
