/* SPDX-License-Identifier: Apache-2.0 */
/* split.c -- split one dimension into one width per rank. */
#include "layout/split.h"

int
tp_split(int64_t size, int64_t unit, int ranks, int64_t *widths, tp_error *err)
{
    if (ranks <= 0 || unit <= 0)
        return tp_fail(err, TP_VALUE, "cannot shard in units of %lld over %d ranks",
                       (long long)unit, ranks);
    if (size < 0 || size % unit != 0)
        return tp_fail(err, TP_VALUE, "size %lld is not a multiple of unit %lld",
                       (long long)size, (long long)unit);

    const int64_t units = size / unit;
    for (int rank = 0; rank < ranks; rank++) {
        const int64_t extra = rank < units % ranks;
        widths[rank] = (units / ranks + extra) * unit;
    }
    return 0;
}

int64_t
tp_split_fit(int64_t size, int64_t unit, int ranks)
{
    while (unit > 1 && size / unit < ranks)
        unit /= 2;
    return unit;
}

int
tp_split_grain(int64_t size, int64_t grain, int ranks, int64_t *widths, tp_error *err)
{
    if (ranks <= 0 || grain <= 0)
        return tp_fail(err, TP_VALUE, "cannot shard in grains of %lld over %d ranks",
                       (long long)grain, ranks);
    if (size < ranks)
        return tp_fail(
            err, TP_VALUE,
            "size %lld cannot be sharded over %d ranks: a rank would get nothing",
            (long long)size, ranks);

    grain = tp_split_fit(size, grain, ranks);
    const int64_t rest = size % grain;
    if (tp_split(size - rest, grain, ranks, widths, err) < 0)
        return -1;
    /* The last rank never has more grains than another, so with less than one
     * grain on top widths still differ by at most a grain. */
    widths[ranks - 1] += rest;
    return 0;
}
