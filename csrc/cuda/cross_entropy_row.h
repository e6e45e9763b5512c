/* SPDX-License-Identifier: Apache-2.0 */
/* cross_entropy_row.h -- the arithmetic of cross-entropy over one row of logits.
 *
 * C++ that a GPU and a host compile alike, so that the tests compare the very functions
 * that run on a GPU with torch's results. With x the logits of a row, m the largest:
 *
 *     m, s = sum of exp(x - m)              in one pass
 *     dx   = scale (exp(x - logsumexp) - [column is the label's])
 *
 * and, where a soft cap c is given, c tanh(x / c) in place of x.
 * Sums are in float32. The order in which a row is summed is fixed by its width, its
 * alignment and the number of threads, so the same call gives the same bits. */
#ifndef TP_CROSS_ENTROPY_ROW_H
#define TP_CROSS_ENTROPY_ROW_H

#include <math.h>
#include <stdint.h>

#include "cuda/cross_entropy.h"
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

/* Packs that a thread has on their way at once: 64 bytes, as in copy.h. */
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
nothing()
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
joined(Sum a, Sum b)
{
    const float largest = fmaxf(a.largest, b.largest);
    return {largest, a.total * rescale(a.largest, largest) +
                         b.total * rescale(b.largest, largest)};
}

/* Take up the logits of a pack, with one rescaling for all of them. One that is no
 * number makes the total none. */
template <typename Logits, typename Cap>
TP_INLINE void
take(Sum *sum, const Logits &logits, const Cap &cap)
{
    float values[Logits::kCount];
    float largest = sum->largest;
    TP_UNROLL
    for (int i = 0; i < Logits::kCount; i++) {
        values[i] = cap.seen(value_of(logits.at[i]));
        largest = fmaxf(largest, values[i]);
    }
    float total = sum->total * rescale(sum->largest, largest);
    /* Less its own -inf a value would be no number; its exponential is 0. */
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
summed(const Logit *row, int64_t width, int thread, int threads, const Cap &cap)
{
    constexpr int kCount = Pack<Logit>::kCount;
    const int64_t head = unaligned(row, width);
    const int64_t packs = (width - head) / kCount;
    const auto *body = reinterpret_cast<const Pack<Logit> *>(row + head);
    Sum sum = nothing();
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
                take(&sum, held[k], cap);
    }
    const int64_t tail = head + packs * kCount;
    for (int64_t i = thread; i < head + width - tail; i += threads) {
        take(&sum, Single<Logit>{{row[i < head ? i : tail + i - head]}}, cap);
    }
    return sum;
}

/* What the loss sees of the label's logit; 0 where another rank holds it. */
template <typename Logit, typename Cap>
TP_INLINE float
label_seen(const tp_vocab_args &args, int64_t token, const Logit *row, const Cap &cap)
{
    const int64_t label = args.columns[token];
    const bool here = label >= 0 && label < args.width;
    return here ? cap.seen(value_of(row[label])) : 0.0f;
}

/* Write what was found in a row. */
TP_INLINE void
put_found(const tp_vocab_args &args, int64_t token, const Sum &whole, float label)
{
    args.found[token] = whole.largest;
    args.found[args.tokens + token] = whole.total;
    args.found[2 * args.tokens + token] = label;
}

/* What a row's gradient is made with. */
struct Slope {
    float logsumexp;
    float scale;   /* 0 for a row without a loss, whatever its logits are */
    int64_t label; /* column; outside of the row where another rank holds it */
};

TP_INLINE Slope
slope_of(const tp_vocab_args &args, int64_t token)
{
    return {args.logsumexp[token], args.scale[token], args.columns[token]};
}

template <typename Cap>
TP_INLINE float
derived(float x, bool is_label, const Slope &slope, const Cap &cap)
{
    const float y = cap.seen(x);
    const float p = exponential(y - slope.logsumexp) - (is_label ? 1.0f : 0.0f);
    return slope.scale * p * cap.slope(y);
}

/* `label` is counted from the pack's first column; one pack of a row has it. */
template <typename Logit, typename Cap>
TP_INLINE void
derive_pack(Pack<Logit> *pack, int64_t label, const Slope &slope, const Cap &cap)
{
    constexpr int kCount = Pack<Logit>::kCount;
    float x[kCount];
    TP_UNROLL
    for (int i = 0; i < kCount; i++)
        x[i] = value_of(pack->at[i]);
    if (label >= 0 && label < kCount) {
        TP_UNROLL
        for (int i = 0; i < kCount; i++)
            x[i] = derived(x[i], i == label, slope, cap);
    } else {
        TP_UNROLL
        for (int i = 0; i < kCount; i++)
            x[i] = derived(x[i], false, slope, cap);
    }
    TP_UNROLL
    for (int i = 0; i < kCount; i += 2)
        assign_two(&pack->at[i], x[i], x[i + 1]);
}

/* Put the gradients of thread `thread`'s part of a row in the place of its logits. */
template <typename Logit, typename Cap>
TP_INLINE void
derive(Logit *row, int64_t width, int thread, int threads, const Slope &slope,
       const Cap &cap)
{
    constexpr int kCount = Pack<Logit>::kCount;
    const int64_t head = unaligned(row, width);
    const int64_t packs = (width - head) / kCount;
    auto *body = reinterpret_cast<Pack<Logit> *>(row + head);
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
        for (int k = 0; k < kPacks; k++) {
            const int64_t at = first + k * static_cast<int64_t>(threads);
            if (at >= packs)
                break;
            derive_pack(&held[k], slope.label - head - at * kCount, slope, cap);
            body[at] = held[k];
        }
    }
    const int64_t tail = head + packs * kCount;
    for (int64_t i = thread; i < head + width - tail; i += threads) {
        const int64_t column = i < head ? i : tail + i - head;
        const float x = value_of(row[column]);
        assign(&row[column], derived(x, column == slope.label, slope, cap));
    }
}

/* The same for a row without a loss, whose logits may be no numbers. */
template <typename Logit>
TP_INLINE void
clear(Logit *row, int64_t width, int thread, int threads)
{
    constexpr int kCount = Pack<Logit>::kCount;
    const int64_t head = unaligned(row, width);
    const int64_t packs = (width - head) / kCount;
    auto *body = reinterpret_cast<Pack<Logit> *>(row + head);
    for (int64_t at = thread; at < packs; at += threads)
        body[at] = Pack<Logit>{};
    const int64_t tail = head + packs * kCount;
    for (int64_t i = thread; i < head + width - tail; i += threads)
        row[i < head ? i : tail + i - head] = Logit{};
}

}  // namespace tp

#endif
