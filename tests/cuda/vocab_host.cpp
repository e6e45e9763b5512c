// SPDX-License-Identifier: Apache-2.0
// vocab_host.cpp -- what vocab.cu does, on the host: the same arithmetic, thread by
// thread.
//
// Only what threads exchange is written here again, as the same tree.
#include <vector>

#include "../../csrc/cuda/vocab.h"
#include "../../csrc/cuda/vocab_row.h"

namespace
{

constexpr int kThreads = 512;

tp::Sum
sum_of_warp(const tp::Sum *given)
{
    std::vector<tp::Sum> lanes(given, given + 32);
    for (int apart = 16; apart > 0; apart /= 2) {
        const std::vector<tp::Sum> before = lanes;
        for (int lane = 0; lane < 32; lane++)
            lanes[lane] = tp::joined(before[lane], before[lane ^ apart]);
    }
    return lanes[0];
}

template <typename Logit>
void
statistics(const tp_vocab_args &args)
{
    for (int64_t token = 0; token < args.tokens; token++) {
        const auto *row = static_cast<const Logit *>(args.logits) + token * args.width;
        std::vector<tp::Sum> sums;
        for (int thread = 0; thread < kThreads; thread++)
            sums.push_back(tp::summed(row, args.width, thread, kThreads, args.cap));
        std::vector<tp::Sum> of_warp(32, tp::nothing());
        for (int warp = 0; warp < kThreads / 32; warp++)
            of_warp[warp] = sum_of_warp(&sums[32 * warp]);
        const tp::Sum whole = sum_of_warp(of_warp.data());
        tp::put_found(args, token, row, whole);
    }
}

template <typename Logit>
void
gradient(const tp_vocab_args &args)
{
    for (int64_t token = 0; token < args.tokens; token++) {
        const tp::Slope slope = tp::slope_of(args, token);
        for (int thread = 0; thread < kThreads; thread++)
            tp::derive(static_cast<Logit *>(args.logits) + token * args.width,
                       args.width, thread, kThreads, slope);
    }
}

template <typename Logit>
void
run(const tp_vocab_args &args, int wants_gradient)
{
    if (wants_gradient)
        gradient<Logit>(args);
    else
        statistics<Logit>(args);
}

}  // namespace

extern "C" void
host_run(const tp_vocab_args *args, int wants_gradient)
{
    if (args->type == TP_LOGIT_FLOAT)
        run<float>(*args, wants_gradient);
    else if (args->type == TP_LOGIT_HALF)
        run<tp::Half>(*args, wants_gradient);
    else
        run<tp::Brain>(*args, wants_gradient);
}
