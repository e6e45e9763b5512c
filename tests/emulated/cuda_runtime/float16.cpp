// SPDX-License-Identifier: Apache-2.0
// float16.cpp -- float16.h on arrays, so that a test can try every 16-bit float there
// is.
#include "cuda/float16.h"
#include "cuda/cross_entropy.h"

namespace
{

template <typename Number>
void
read(const void *numbers, float *floats, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        floats[i] = tp::value_of(static_cast<const Number *>(numbers)[i]);
}

template <typename Number>
void
round_to(const float *floats, void *numbers, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        tp::assign(static_cast<Number *>(numbers) + i, floats[i]);
}

}  // namespace

extern "C" void
numbers_read(const void *numbers, float *floats, int64_t count, int32_t type)
{
    (type == TP_LOGIT_FLOAT16 ? read<tp::Half> : read<tp::BFloat16>)(numbers, floats,
                                                                     count);
}

extern "C" void
numbers_round(const float *floats, void *numbers, int64_t count, int32_t type)
{
    (type == TP_LOGIT_FLOAT16 ? round_to<tp::Half>
                              : round_to<tp::BFloat16>)(floats, numbers, count);
}
