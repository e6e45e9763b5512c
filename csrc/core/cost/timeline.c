/* SPDX-License-Identifier: Apache-2.0 */
/* timeline.c -- the most that is alive at once in a step, from parts of it. */
#include "cost/timeline.h"

static double
weight(tp_moment moment, double share)
{
    return (double)moment.live + share * (double)moment.gradients;
}

static tp_moment
plus(tp_moment a, tp_moment b)
{
    return (tp_moment){a.live + b.live, a.gradients + b.gradients};
}

tp_moment
tp_timeline_peak(const tp_part *parts, int count, double share)
{
    tp_moment now = {0, 0}, peak = {0, 0};
    for (int i = 0; i < count; i++) {
        for (int repeat = 0; repeat < parts[i].repeats; repeat++) {
            for (int j = 0; j < parts[i].count; j++) {
                const tp_moment at = plus(now, parts[i].moments[j]);
                peak = weight(at, share) > weight(peak, share) ? at : peak;
            }
            now = plus(now, parts[i].end);
        }
    }
    return peak;
}

int64_t
tp_activation_formula(const tp_formula_sizes *sizes)
{
    enum { REPLICATED = 10, SHARDED = 24, INPUT = 2, HALF = 2 };
    const int64_t values = sizes->layers * sizes->tokens * sizes->hidden;
    const int64_t ranks = sizes->ranks;
    int64_t bytes = values * REPLICATED + values * SHARDED / ranks;
    if (sizes->checkpointing)
        bytes = values * INPUT;
    else if (sizes->sequence_parallel)
        bytes = values * (REPLICATED + SHARDED) / ranks;
    return bytes * sizes->itemsize / HALF;
}
