/* SPDX-License-Identifier: Apache-2.0 */
/* compact.h -- move the runs of a shard to the front of the full tensor's own memory.
 *
 * For when there is no room for the shard beside the full tensor. Every byte moves to
 * a lower address or stays, so what may run at once is a matter of how far: a step's
 * writes end where its reads begin. On a CPU it copies; for a GPU it lists the steps.
 */
#ifndef TP_COMPACT_H
#define TP_COMPACT_H

#include <stdbool.h>

#include "pack/copies.h"

/* Where a plan of steps stands: before `run` of outer row `row`, `done` bytes of that
 * run behind it. Starts as zeros with the view, whose runs ascend. */
typedef struct {
    const tp_shard_view *view; /* borrowed */
    int64_t row;
    int64_t run;
    int64_t done;
} tp_compaction;

/* Steps run one after the other. Of one that is `in_order` each byte is read before
 * any later one is written; the bytes of all others may move in any order. */
typedef struct {
    tp_shard_view view; /* of some of the rows, or of a stretch */
    int64_t full;  /* byte of the memory where the step's part of the tensor begins */
    int64_t shard; /* byte of the memory where it goes */
    int64_t stretch[2]; /* the run of a step that is a stretch */
    bool in_order;
} tp_compact_step;

/* Whether the runs ascend and share no element, so that nothing moves to a higher
 * address. Fails with TP_VALUE. Follows tp_shard_check. */
int tp_compact_check(const tp_shard_view *view, tp_error *err);

/* The next step in `step`, which has to stay where it is while it is used; false when
 * all is done. */
bool tp_compact_next(tp_compaction *at, tp_compact_step *step);

/* The copies of a step in a tensor at `memory`, in the order of addresses. */
int tp_compact_copies(const tp_compact_step *step, void *memory, tp_copies *list,
                      tp_error *err);

/* Compact a tensor on a CPU. */
void tp_compact_on_cpu(const tp_shard_view *view, void *memory);

#endif
