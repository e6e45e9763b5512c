/* SPDX-License-Identifier: Apache-2.0 */
/* traffic.c -- what a step sends between ranks, and for how long. */
#include "cost/traffic.h"

#include <string.h>

#include "base/did_you_mean.h"
#include "base/text.h"

enum { PARTITIONED = 3 };

static const char *const names[TP_COLLECTIVES] = {
    [TP_ALL_REDUCE] = "all-reduce",
    [TP_ALL_GATHER] = "all-gather",
    [TP_REDUCE_SCATTER] = "reduce-scatter",
    [TP_BROADCAST] = "broadcast",
};

const char *
tp_collective_name(tp_collective kind)
{
    return names[kind];
}

int
tp_collective_of(const char *name, tp_collective *out, tp_error *err)
{
    for (int i = 0; i < TP_COLLECTIVES; i++) {
        if (strcmp(name, names[i]) == 0) {
            *out = (tp_collective)i;
            return 0;
        }
    }
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "collective: got '%s', expected a kind of collective", name);
    tp_did_you_mean_add(&text, name, names, TP_COLLECTIVES);
    return tp_text_fail(&text, TP_VALUE, err);
}

double
tp_collective_seconds(tp_collective kind, int64_t bytes, int64_t ranks,
                      double bandwidth)
{
    const double others = (double)(ranks - 1);
    const double each = (double)bytes / bandwidth;
    switch (kind) {
        case TP_ALL_REDUCE:
            return 2 * each * others / (double)ranks;
        case TP_ALL_GATHER:
            return each * others;
        case TP_REDUCE_SCATTER:
            return each * others / (double)ranks;
        default:
            return ranks > 1 ? each : 0;
    }
}

int
tp_replica_traffic_of(const tp_memory_options *options, const tp_rank_memory *memory,
                      tp_replica_traffic *rows)
{
    int count = 0;
    if (options->replicas == 1 || memory->trained == 0)
        return 0;
    const int64_t item = memory->item;
    const int64_t gradients = memory->trained * item;
    if (options->stage < PARTITIONED) {
        /* Also where a rank keeps its partition only: buckets are summed on all ranks
         * (use_multi_rank_bucket_allreduce of runtime/zero/stage_1_and_2.py). */
        rows[count++] = (tp_replica_traffic){TP_ALL_REDUCE, gradients, "gradients"};
        if (options->stage > 0)
            rows[count++] = (tp_replica_traffic){
                TP_ALL_GATHER, memory->partition * item, "trained weights"};
        return count;
    }
    rows[count++] = (tp_replica_traffic){TP_ALL_GATHER, memory->fetched,
                                         "weights in the forward pass"};
    /* Those that stay gathered are not fetched again. */
    if (memory->refetched > 0)
        rows[count++] = (tp_replica_traffic){TP_ALL_GATHER, memory->refetched,
                                             "weights in the backward pass"};
    if (memory->refreshed > 0)
        rows[count++] = (tp_replica_traffic){TP_ALL_GATHER, memory->refreshed,
                                             "small weights after the step"};
    rows[count++] = (tp_replica_traffic){
        TP_REDUCE_SCATTER, memory->partition * item * options->replicas, "gradients"};
    return count;
}
