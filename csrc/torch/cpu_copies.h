// SPDX-License-Identifier: Apache-2.0
// cpu_copies.h -- copies between a full tensor and a shard, by torch's CPU threads.
#ifndef TP_CPU_COPIES_H
#define TP_CPU_COPIES_H

#include <algorithm>

#include "torch/runs.h"

namespace tp
{

// 1 MiB takes some 50 us to copy, several times the cost of waking a thread.
constexpr int64_t kGrainBytes = 1 << 20;
// Threads get pages, so that two of them never write to one cache line.
constexpr int64_t kPage = 4096;

// One copy as torch's threads see it; lives on the stack of the operator.
struct CpuCopy {
    tp_shard_view view;
    const void *source;  // borrowed
    void *target;        // borrowed
    int64_t bytes;       // to copy
    int64_t begin = 0;   // byte of the shard that is the first to copy

    // The byte at which the pages before `page` end.
    int64_t end_of(int64_t page) const
    {
        return std::min(page * kPage, bytes);
    }

    // `pages` is given [begin, end) of the pages, and this copy as its context.
    void run(ParallelFunc pages)
    {
        const int64_t count = bytes / kPage + (bytes % kPage != 0);
        STABLE_TORCH_ERROR_CODE_CHECK(
            torch_parallel_for(0, count, kGrainBytes / kPage, pages, this));
    }
};

}  // namespace tp

#endif
