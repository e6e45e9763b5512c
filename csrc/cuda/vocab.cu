/* SPDX-License-Identifier: Apache-2.0 */
/* vocab.cu -- one block for each row of logits.
 *
 * Rows are long, tens of thousands of columns, and there are thousands of them: a block
 * for a row keeps its sums in registers, and no atomic makes the order of a sum vary.
 * Sums are in float32: each thread's in the order of its columns, then over the lanes
 * of a warp and over the warps by a fixed tree. */
#include "vocab.h"

#include "launch.h"
#include "vocab_row.h"

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
        sum = tp::joined(sum, other);
    }
    return sum;
}

template <typename Logit>
__global__ void
__launch_bounds__(kThreads)
    statistics_kernel(const tp_vocab_args __grid_constant__ args)
{
    __shared__ tp::Sum of_warp[kWarps];
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t token = blockIdx.x;
    const auto *row = static_cast<const Logit *>(args.logits) + token * args.width;

    const tp::Sum sum =
        sum_of_warp(tp::summed(row, args.width, thread, kThreads, args.cap));
    if (thread % 32 == 0)
        of_warp[thread / 32] = sum;
    __syncthreads();
    if (thread >= 32)
        return;
    const tp::Sum whole =
        sum_of_warp(thread < kWarps ? of_warp[thread] : tp::nothing());
    if (thread > 0)
        return;
    tp::put_found(args, token, row, whole);
}

template <typename Logit>
__global__ void
__launch_bounds__(kThreads) gradient_kernel(const tp_vocab_args __grid_constant__ args)
{
    const int64_t token = blockIdx.x;
    auto *row = static_cast<Logit *>(args.logits) + token * args.width;
    tp::derive(row, args.width, static_cast<int>(threadIdx.x), kThreads,
               tp::slope_of(args, token));
}

template <typename Logit>
cudaError_t
launch(const tp_vocab_args &args, bool gradient, void *stream)
{
    const auto kernel = gradient ? gradient_kernel<Logit> : statistics_kernel<Logit>;
    return tp::launch(kernel, args.tokens, kThreads, stream, args);
}

cudaError_t
start(const tp_vocab_args &args, bool gradient, void *stream)
{
    if (args.tokens == 0 || (gradient && args.width == 0))
        return cudaSuccess;
    if (args.tokens > kMostRows)
        return cudaErrorInvalidConfiguration;
    switch (args.type) {
        case TP_LOGIT_FLOAT:
            return launch<float>(args, gradient, stream);
        case TP_LOGIT_HALF:
            return launch<tp::Half>(args, gradient, stream);
        case TP_LOGIT_BRAIN:
            return launch<tp::Brain>(args, gradient, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

extern "C" int
tp_vocab_statistics(const tp_vocab_args *args, void *stream)
{
    return start(*args, false, stream);
}

extern "C" int
tp_vocab_gradient(const tp_vocab_args *args, void *stream)
{
    return start(*args, true, stream);
}
