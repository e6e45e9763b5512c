/* SPDX-License-Identifier: Apache-2.0 */
/* chunks.c -- where the elements of a shard are in the full parameter. */
#include "plan/chunks.h"

#include <stdlib.h>

#include "plan/plan_build.h"

/* The part of the dimension that shrinks which the view has in its outer and inner
 * dimensions: it has `repeats` blocks of the sharded dimension, in steps of `scale`. */
static void
within_dimension(const tp_entry *entry, const tp_parameter *parameter, int64_t *repeats,
                 int64_t *scale)
{
    int64_t before = 1, behind = 1;
    for (int i = 0; i < parameter->dims; i++) {
        if (i < entry->dim)
            before *= parameter->shape[i];
        else if (i > entry->dim)
            behind *= parameter->shape[i];
    }
    *repeats = entry->outer / before;
    *scale = entry->inner / behind;
}

static void
append(tp_chunk *chunks, int *count, tp_chunk chunk)
{
    tp_chunk *last = *count > 0 ? &chunks[*count - 1] : NULL;
    if (last != NULL && last->is_owned == chunk.is_owned &&
        last->from + last->length == chunk.from && last->at + last->length == chunk.at)
        last->length += chunk.length;
    else
        chunks[(*count)++] = chunk;
}

int
tp_chunks(const tp_plan *plan, int entry, int rank, int64_t begin, int64_t end,
          tp_chunk **chunks, int *count, tp_error *err)
{
    const tp_entry *at = tp_plan_entry(plan, entry);
    const tp_parameter *parameter = tp_model_parameter(plan->model, at->parameter);
    if (at->layout == NULL)
        return tp_fail(err, TP_VALUE, "%s is replicated, expected a sharded parameter",
                       parameter->name);
    const tp_shard *shard = &at->layout->shards[rank];
    int64_t repeats, scale;
    within_dimension(at, parameter, &repeats, &scale);
    const int64_t size = repeats * shard->width * scale;
    if (begin < 0 || begin > end || end > size)
        return tp_fail(
            err, TP_VALUE, "%s: from %lld to %lld, expected bounds in 0 to %lld",
            parameter->name, (long long)begin, (long long)end, (long long)size);
    tp_chunk *list = calloc((size_t)(repeats * shard->count + 1), sizeof(*list));
    if (list == NULL)
        return tp_fail_memory(err);
    int64_t from = 0;
    *count = 0;
    for (int64_t repeat = 0; repeat < repeats; repeat++)
        for (int i = 0; i < shard->count; i++) {
            const tp_run *run = &shard->runs[i];
            const int64_t start = (repeat * at->layout->size + run->start) * scale;
            const int64_t stop = from + run->length * scale;
            const int64_t first = begin > from ? begin : from;
            const int64_t last = end < stop ? end : stop;
            if (first < last)
                append(list, count,
                       (tp_chunk){first, start + first - from, last - first,
                                  run->owner == rank});
            from = stop;
        }
    *chunks = list;
    return 0;
}
