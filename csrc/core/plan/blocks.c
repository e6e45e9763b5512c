/* SPDX-License-Identifier: Apache-2.0 */
/* blocks.c -- the shard of a quantised parameter in whole blocks of it. */
#include "plan/blocks.h"

#include <stdlib.h>

#include "plan/plan_build.h"

/* In elements; runs that follow one another become one, so that only the ends of what
 * is held count. */
static void
append(tp_blocks *blocks, tp_run run)
{
    tp_run *last = blocks->count > 0 ? &blocks->runs[blocks->count - 1] : NULL;
    if (last != NULL && last->start + last->length == run.start)
        last->length += run.length;
    else
        blocks->runs[blocks->count++] = run;
}

int
tp_blocks_of(const tp_plan *plan, int entry, int rank, int64_t block, tp_blocks *out,
             tp_error *err)
{
    const tp_entry *at = tp_plan_entry(plan, entry);
    const char *name = tp_model_parameter(plan->model, at->parameter)->name;
    if (block <= 0)
        return tp_fail(err, TP_VALUE, "block: got %lld, expected a positive size",
                       (long long)block);
    if (at->layout == NULL)
        return tp_fail(err, TP_VALUE, "%s is replicated, expected a sharded parameter",
                       name);
    const tp_shard *shard = &at->layout->shards[rank];
    const int64_t elements = at->layout->size * at->inner;
    if (elements % block != 0)
        return tp_fail(err, TP_VALUE,
                       "%s: got %lld elements, expected whole blocks of %lld elements",
                       name, (long long)elements, (long long)block);
    tp_blocks blocks = {at->outer, elements / block, NULL, 0};
    blocks.runs = calloc((size_t)(shard->count + 1), sizeof(*blocks.runs));
    if (blocks.runs == NULL)
        return tp_fail_memory(err);
    for (int i = 0; i < shard->count; i++) {
        tp_run run = shard->runs[i];
        run.start *= at->inner;
        run.length *= at->inner;
        append(&blocks, run);
    }
    for (int i = 0; i < blocks.count; i++) {
        tp_run *run = &blocks.runs[i];
        if (run->start % block != 0 || run->length % block != 0) {
            tp_fail(
                err, TP_VALUE,
                "%s: rank %d would hold %lld elements from %lld on out of each %lld, "
                "expected whole blocks of %lld elements",
                name, rank, (long long)run->length, (long long)run->start,
                (long long)elements, (long long)block);
            free(blocks.runs);
            return -1;
        }
        run->start /= block;
        run->length /= block;
    }
    *out = blocks;
    return 0;
}
