/* SPDX-License-Identifier: Apache-2.0 */
/* logsumexp.h -- largest logit and sum of exponentials of a row, in one pass.
 *
 * C++ that a GPU and a CPU compile alike, so that the tests compare the very functions
 * that run on a GPU with torch's results. With x the logits of a row, m the largest:
 *
 *     m, s = sum of exp(x - m)
 *
 * and, where a soft cap c is given, c tanh(x / c) in place of x. Sums are in float32.
 * The order in which a row is summed is fixed by its width, its alignment and the
 * number of threads, so the same call gives the same bits. */
#ifndef TP_LOGSUMEXP_H
#define TP_LOGSUMEXP_H

#include <math.h>
#include <stdint.h>

#include "cuda/float16.h"

namespace tp
{

/* As many logits as the widest load takes. */
template <typename Logit>
struct alignas(16) Pack {
    static constexpr int kCount = 16 / sizeof(Logit);
    Logit at[kCount];
};

template <typename Logit>
struct Single {
    static constexpr int kCount = 1;
    Logit at[kCount];
};

/* Packs that a thread loads at once: 64 bytes, as in copy.h. */
constexpr int kPacks = 4;
constexpr float kLog2E = 1.4426950408889634f;

/* exp(x). On a GPU one instruction after the product with log2(e), which rounds; the
 * error is about 2 ulp near 0, where the terms that matter are, and |x| ulp elsewhere.
 */
TP_INLINE float
exponential(float x)
{
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2E));
    return y;
#else
    return exp2f(x * kLog2E);
#endif
}

/* What the loss sees of a logit, and the slope of that where it is `y`. A type for each
 * way: asked once for a row, and not for each logit, the loop below has no branch, in
 * which a GPU issues a fifth to a half of the instructions. */
struct Plain {
    explicit TP_INLINE Plain(float)
    {
    }
    TP_INLINE float seen(float x) const
    {
        return x;
    }
    TP_INLINE float slope(float) const
    {
        return 1.0f;
    }
};

struct Capped {
    explicit TP_INLINE Capped(float cap) : limit(cap), inverse(1.0f / cap)
    {
    }
    TP_INLINE float seen(float x) const
    {
        return limit * tanhf(x * inverse);
    }
    TP_INLINE float slope(float y) const
    {
        const float t = y * inverse;
        return 1.0f - t * t;
    }

    float limit;
    float inverse;
};

/* The largest value so far, and the sum of exponentials of the values less it. */
struct Sum {
    float largest;
    float total;
};

TP_INLINE Sum
empty_sum()
{
    return {-INFINITY, 0.0f};
}

/* exp(from - to), where from <= to; 1 where nothing but -inf was seen. */
TP_INLINE float
rescale(float from, float to)
{
    return from == to ? 1.0f : exponential(from - to);
}

TP_INLINE Sum
merged(Sum a, Sum b)
{
    const float largest = fmaxf(a.largest, b.largest);
    return {largest, a.total * rescale(a.largest, largest) +
                         b.total * rescale(b.largest, largest)};
}

/* Add the logits of a pack, with one rescaling for all of them. A NaN makes the total
 * NaN. */
template <typename Logits, typename Cap>
TP_INLINE void
add_logits(Sum *sum, const Logits &logits, const Cap &cap)
{
    float values[Logits::kCount];
    float largest = sum->largest;
    TP_UNROLL
    for (int i = 0; i < Logits::kCount; i++) {
        values[i] = cap.seen(value_of(logits.at[i]));
        largest = fmaxf(largest, values[i]);
    }
    float total = sum->total * rescale(sum->largest, largest);
    /* -inf less -inf would be NaN; its exponential is 0. */
    const float base = largest == -INFINITY ? 0.0f : largest;
    TP_UNROLL
    for (int i = 0; i < Logits::kCount; i++)
        total += exponential(values[i] - base);
    sum->largest = largest;
    sum->total = total;
}

/* Columns ahead of the first one at an address that a pack may be loaded from. */
template <typename Logit>
TP_INLINE int64_t
unaligned(const Logit *row, int64_t width)
{
    const uintptr_t past = reinterpret_cast<uintptr_t>(row) % 16;
    const int64_t columns =
        past == 0 ? 0 : static_cast<int64_t>((16 - past) / sizeof(Logit));
    return columns < width ? columns : width;
}

/* What thread `thread` of `threads` sums of a row. */
template <typename Logit, typename Cap>
TP_INLINE Sum
sum_row(const Logit *row, int64_t width, int thread, int threads, const Cap &cap)
{
    constexpr int kCount = Pack<Logit>::kCount;
    const int64_t head = unaligned(row, width);
    const int64_t packs = (width - head) / kCount;
    const auto *body = reinterpret_cast<const Pack<Logit> *>(row + head);
    Sum sum = empty_sum();
    for (int64_t first = thread; first < packs;
         first += kPacks * static_cast<int64_t>(threads)) {
        Pack<Logit> held[kPacks];
        TP_UNROLL
        for (int k = 0; k < kPacks; k++) {
            const int64_t at = first + k * static_cast<int64_t>(threads);
            if (at < packs)
                held[k] = body[at];
        }
        TP_UNROLL
        for (int k = 0; k < kPacks; k++)
            if (first + k * static_cast<int64_t>(threads) < packs)
                add_logits(&sum, held[k], cap);
    }
    const int64_t tail = head + packs * kCount;
    for (int64_t i = thread; i < head + width - tail; i += threads) {
        add_logits(&sum, Single<Logit>{{row[i < head ? i : tail + i - head]}}, cap);
    }
    return sum;
}

}  // namespace tp

#endif
