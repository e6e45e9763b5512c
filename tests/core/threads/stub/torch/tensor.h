// SPDX-License-Identifier: Apache-2.0
// tensor.h -- what handles.h takes of csrc/torch/tensor.h, without torch.
#ifndef TP_TENSOR_H
#define TP_TENSOR_H

#include <cstdint>
#include <stdexcept>

namespace tp
{

inline void
require(bool holds, const char *words)
{
    if (!holds)
        throw std::invalid_argument(words);
}

}  // namespace tp

#endif
