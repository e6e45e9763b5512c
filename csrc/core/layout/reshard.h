/* SPDX-License-Identifier: Apache-2.0 */
/* reshard.h -- which pieces of old shards make a new one.
 *
 * Old and new shards are runs along the same sharded dimension, laid over different
 * numbers of ranks or by different rules. Moves nothing. */
#ifndef TP_RESHARD_H
#define TP_RESHARD_H

#include <stdint.h>

#include "base/error.h"

/* start, length, start, length, ... of one shard along the sharded dimension. */
typedef struct {
    const int64_t *values;
    int count; /* of values: two for each run */
} tp_run_list;

/* `length` elements from `from` on of the old shard of `rank` are those from `to` on of
 * the new one; offsets are along the sharded dimension of the shards. */
typedef struct {
    int rank;
    int64_t from;
    int64_t to;
    int64_t length;
} tp_reshard_copy;

/* The copies that make the shard `target` out of the shards `sources`, one per old
 * rank, in the order of the new shard. What several old ranks hold is taken from the
 * lowest, its owner. `*copies` is the caller's to free, also when it is empty. Fails
 * with TP_VALUE for runs that are no runs, and where no old rank holds what is asked
 * for. */
int tp_reshard(const tp_run_list *sources, int ranks, tp_run_list target,
               tp_reshard_copy **copies, int *count, tp_error *err);

#endif
