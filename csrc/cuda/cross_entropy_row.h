/* SPDX-License-Identifier: Apache-2.0 */
/* cross_entropy_row.h -- statistics and gradient of cross-entropy over one row.
 *
 * C++ that a GPU and a CPU compile alike, as logsumexp.h is. With x the logits of a
 * row, capped where there is a soft cap:
 *
 *     dx = scale (exp(x - logsumexp) - [column is the label's]) */
#ifndef TP_CROSS_ENTROPY_ROW_H
#define TP_CROSS_ENTROPY_ROW_H

#include "cuda/cross_entropy.h"
#include "cuda/logsumexp.h"

namespace tp
{

/* What the loss sees of the label's logit; 0 where another rank holds it. */
template <typename Logit, typename Cap>
TP_INLINE float
label_logit(const tp_cross_entropy_args &args, int64_t token, const Logit *row,
            const Cap &cap)
{
    const int64_t label = args.columns[token];
    const bool here = label >= 0 && label < args.width;
    return here ? cap.seen(value_of(row[label])) : 0.0f;
}

/* Write the statistics of a row. */
TP_INLINE void
put_statistics(const tp_cross_entropy_args &args, int64_t token, const Sum &sum,
               float label)
{
    args.statistics[token] = sum.largest;
    args.statistics[args.tokens + token] = sum.total;
    args.statistics[2 * args.tokens + token] = label;
}

/* What a row's gradient is made with. */
struct Slope {
    float logsumexp;
    float scale;   /* 0 for a row without a loss, whatever its logits are */
    int64_t label; /* column; outside of the row where another rank holds it */
};

TP_INLINE Slope
slope_of(const tp_cross_entropy_args &args, int64_t token)
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

/* The same for a row without a loss, whose logits may be NaN. */
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
