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

int
tp_activation_formula(const tp_formula_sizes *sizes, int64_t *bytes, tp_error *err)
{
    enum { REPLICATED = 10, SHARDED = 24, INPUT = 2, HALF = 2 };
    const int64_t ranks = sizes->ranks;
    int64_t values, most;
    if (sizes->layers < 0 || sizes->tokens < 0 || sizes->hidden < 0 || ranks < 1 ||
        sizes->itemsize < 1)
        return tp_fail(err, TP_VALUE,
                       "layers, tokens and hidden: expected 0 or more of each; ranks "
                       "and itemsize: 1 or more");
    if (__builtin_mul_overflow(sizes->layers, sizes->tokens, &values) ||
        __builtin_mul_overflow(values, sizes->hidden, &values) ||
        __builtin_mul_overflow(values, REPLICATED + SHARDED, &most) ||
        __builtin_mul_overflow(most, sizes->itemsize, &most))
        return tp_fail(
            err, TP_VALUE,
            "%lld layers of %lld tokens of %lld features: 2^63 bytes or more",
            (long long)sizes->layers, (long long)sizes->tokens,
            (long long)sizes->hidden);
    int64_t kept = values * REPLICATED + values * SHARDED / ranks;
    if (sizes->checkpointing)
        kept = values * INPUT;
    else if (sizes->sequence_parallel)
        kept = values * (REPLICATED + SHARDED) / ranks;
    *bytes = kept * sizes->itemsize / HALF;
    return 0;
}
