/* SPDX-License-Identifier: Apache-2.0 */
/* layouts.c -- which TP, data-parallel and ZeRO sizes fit, the best first. */
#include "cost/layouts.h"

static const double gib = 1024.0 * 1024.0 * 1024.0;

/* In steps of 0.01 ms, as times are printed. */
static double
rounded(double seconds)
{
    return seconds < 1e9 ? (double)(int64_t)(seconds * 1e5 + 0.5) * 1e-5 : seconds;
}

static double
seconds_per_replica(const tp_candidate *candidate)
{
    return rounded(candidate->seconds) / (double)candidate->replicas;
}

/* Below 0 where `a` is better than `b`; never 0 for two sizes that differ. */
static int
compare(const tp_candidate *a, const tp_candidate *b, int64_t memory)
{
    const bool a_fits = a->bytes <= memory, b_fits = b->bytes <= memory;
    if (a_fits != b_fits)
        return a_fits ? -1 : 1;
    if (!a_fits && a->bytes != b->bytes)
        return a->bytes < b->bytes ? -1 : 1;
    const double a_time = seconds_per_replica(a), b_time = seconds_per_replica(b);
    if (a_time < b_time || a_time > b_time)
        return a_time < b_time ? -1 : 1;
    if (a->replicas != b->replicas)
        return a->replicas > b->replicas ? -1 : 1;
    return a->stage - b->stage;
}

int
tp_order_layouts(const tp_candidate *candidates, int count, int64_t memory, int *order,
                 int *fitting, tp_error *err)
{
    if (memory < 1)
        return tp_fail(err, TP_VALUE, "memory: got %lld bytes, expected more than 0",
                       (long long)memory);
    *fitting = 0;
    for (int i = 0; i < count; i++) {
        int at = i;
        while (at > 0 &&
               compare(&candidates[i], &candidates[order[at - 1]], memory) < 0) {
            order[at] = order[at - 1];
            at--;
        }
        order[at] = i;
        *fitting += candidates[i].bytes <= memory;
    }
    return 0;
}

void
tp_layout_reason(tp_text *out, const tp_candidate *candidate,
                 const tp_candidate *before, const tp_candidate *first, int64_t memory)
{
    const double needed = (double)candidate->bytes / gib;
    if (candidate->bytes > memory) {
        tp_text_add(out, "does not fit: needs %.1f GiB", needed);
        return;
    }
    const double time = seconds_per_replica(candidate);
    const double best = seconds_per_replica(first);
    tp_text_add(out, "fits in %.1f GiB; ", needed);
    if (before == NULL)
        tp_text_add(out, "least communication time for a sequence");
    else if (time > seconds_per_replica(before) && best > 0)
        tp_text_add(out, "%.2f times the communication time of the first", time / best);
    else if (time > seconds_per_replica(before))
        tp_text_add(out, "more communication time than the first");
    else if (candidate->replicas < before->replicas)
        tp_text_add(out, "as much communication, fewer data-parallel ranks");
    else
        tp_text_add(out, "as much communication, a higher stage of ZeRO");
}
