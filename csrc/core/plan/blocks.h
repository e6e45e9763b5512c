/* SPDX-License-Identifier: Apache-2.0 */
/* blocks.h -- the shard of a quantised parameter in whole blocks of it.
 *
 * A quantised weight keeps one scale for so many elements that follow one another in
 * the full weight, row by row. A shard can be taken out of it as it is where each of
 * its runs begins and ends between two blocks. Knows nothing of what a block holds. */
#ifndef TP_BLOCKS_H
#define TP_BLOCKS_H

#include "plan/plan.h"

/* The full parameter as [outer, size] blocks, and the runs of blocks along `size`. */
typedef struct {
    int64_t outer;
    int64_t size;
    tp_run *runs; /* the caller's to free; neighbours are one run */
    int count;
} tp_blocks;

/* The shard of `rank` in blocks of `block` elements, which is positive. Fails with
 * TP_VALUE for a replicated parameter, and where a block would be split. */
int tp_blocks_of(const tp_plan *plan, int entry, int rank, int64_t block,
                 tp_blocks *out, tp_error *err);

#endif
