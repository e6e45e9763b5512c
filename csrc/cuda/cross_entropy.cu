/* SPDX-License-Identifier: Apache-2.0 */
/* cross_entropy.cu -- one block for each row of logits.
 *
 * Rows are long, tens of thousands of columns, and there are thousands of them: a block
 * for a row keeps its sums in registers, and no atomic makes the order of a sum vary.
 * Sums are in float32: each thread's in the order of its columns, then over the lanes
 * of a warp and over the warps by a fixed tree. */
#include "cuda/cross_entropy.h"

#include "cuda/cross_entropy_row.h"
#include "cuda/launch.h"

namespace
{

/* 512 threads with 64 bytes on their way each take 32 KiB of a row at once; a larger
 * block would idle longer in the reduction at the end of a row of usual length. */
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
/* Rows are the grid's first dimension, which takes 2^31 - 1 blocks. */
constexpr int64_t kMostRows = 2147483647;

__device__ tp::Sum
sum_of_warp(tp::Sum sum)
{
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) {
        const tp::Sum other = {__shfl_xor_sync(0xffffffffu, sum.largest, apart),
                               __shfl_xor_sync(0xffffffffu, sum.total, apart)};
        sum = tp::merged(sum, other);
    }
    return sum;
}

template <typename Logit, typename Cap>
__global__ void
__launch_bounds__(kThreads)
    statistics_kernel(const tp_cross_entropy_args __grid_constant__ args)
{
    __shared__ tp::Sum of_warp[kWarps];
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t token = blockIdx.x;
    const auto *row = static_cast<const Logit *>(args.logits) + token * args.width;

    const Cap cap(args.cap);
    /* Loaded ahead of the row: at the end the block would wait for it. */
    const float label = thread == 0 ? tp::label_logit(args, token, row, cap) : 0.0f;
    const tp::Sum sum =
        sum_of_warp(tp::sum_row(row, args.width, thread, kThreads, cap));
    if (thread % 32 == 0)
        of_warp[thread / 32] = sum;
    __syncthreads();
    if (thread >= 32)
        return;
    const tp::Sum row_sum =
        sum_of_warp(thread < kWarps ? of_warp[thread] : tp::empty_sum());
    if (thread > 0)
        return;
    tp::put_statistics(args, token, row_sum, label);
}

/* From the last row on: of what the pass before has read, a cache holds the end. */
template <typename Logit, typename Cap>
__global__ void
__launch_bounds__(kThreads)
    gradient_kernel(const tp_cross_entropy_args __grid_constant__ args)
{
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t token = args.tokens - 1 - blockIdx.x;
    auto *row = static_cast<Logit *>(args.logits) + token * args.width;
    const tp::Slope slope = tp::slope_of(args, token);
    if (slope.scale == 0.0f)
        tp::clear(row, args.width, thread, kThreads);
    else
        tp::derive(row, args.width, thread, kThreads, slope, Cap(args.cap));
}

template <typename Logit, typename Cap>
cudaError_t
launch_with(const tp_cross_entropy_args &args, bool gradient, void *stream)
{
    const auto kernel =
        gradient ? gradient_kernel<Logit, Cap> : statistics_kernel<Logit, Cap>;
    return tp::launch(kernel, args.tokens, kThreads, stream, args);
}

template <typename Logit>
cudaError_t
launch(const tp_cross_entropy_args &args, bool gradient, void *stream)
{
    return args.cap == 0.0f ? launch_with<Logit, tp::Plain>(args, gradient, stream)
                            : launch_with<Logit, tp::Capped>(args, gradient, stream);
}

cudaError_t
start(const tp_cross_entropy_args &args, bool gradient, void *stream)
{
    if (args.tokens == 0 || (gradient && args.width == 0))
        return cudaSuccess;
    if (args.tokens > kMostRows)
        return cudaErrorInvalidConfiguration;
    switch (args.type) {
        case TP_LOGIT_FLOAT32:
            return launch<float>(args, gradient, stream);
        case TP_LOGIT_FLOAT16:
            return launch<tp::Half>(args, gradient, stream);
        case TP_LOGIT_BFLOAT16:
            return launch<tp::BFloat16>(args, gradient, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

extern "C" int
tp_cross_entropy_statistics(const tp_cross_entropy_args *args, void *stream)
{
    return start(*args, false, stream);
}

extern "C" int
tp_cross_entropy_gradient(const tp_cross_entropy_args *args, void *stream)
{
    return start(*args, true, stream);
}
