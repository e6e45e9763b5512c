// SPDX-License-Identifier: Apache-2.0
// tensor.h -- what all operators share: errors, and tensors on the stable ABI.
//
// csrc/torch alone includes torch headers. An operator checks its arguments, allocates
// its result and calls C or a kernel; it decides nothing. It reports failure to the
// dispatcher by an exception, so operators cannot be noexcept; raise() makes one from
// an error of the C code. What torch's threads call is noexcept.
#ifndef TP_TENSOR_H
#define TP_TENSOR_H

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
#include "core/base/error.h"
}

namespace tp
{

using torch::stable::Tensor;

// Throws what `err` says and releases it. torch turns invalid_argument into
// ValueError and bad_alloc into MemoryError.
[[noreturn]] inline void
raise(tp_error *err)
{
    const tp_code code = err->code;
    const std::string message = tp_error_text(err);
    tp_error_clear(err);
    if (code == TP_MEMORY)
        throw std::bad_alloc();
    if (code == TP_VALUE)
        throw std::invalid_argument(message);
    throw std::runtime_error(message);
}

inline void
require(bool holds, const char *message)
{
    if (!holds)
        throw std::invalid_argument(message);
}

// The dtype as torch counts it; Tensor::scalar_type() refuses the rarer ones.
inline int32_t
dtype_of(const Tensor &tensor)
{
    int32_t dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    return dtype;
}

inline int64_t
bytes_of(const Tensor &tensor)
{
    return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

// A new tensor of the dtype and device of `like`. Made without the dispatcher, which
// is half of the time where thousands of small tensors are sharded.
inline Tensor
new_like(const Tensor &like, const std::vector<int64_t> &shape)
{
    int32_t type = 0;
    AtenTensorHandle made = nullptr;
    std::vector<int64_t> strides(shape.size());
    int64_t stride = 1;
    for (size_t dim = shape.size(); dim-- > 0;) {
        strides[dim] = stride;
        stride *= shape[dim] > 0 ? shape[dim] : 1;
    }
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
        dtype_of(like), type, like.get_device_index(), &made));
    return Tensor(made);
}

inline bool
share_memory(const Tensor &a, const Tensor &b)
{
    const auto a_at = reinterpret_cast<uintptr_t>(a.const_data_ptr());
    const auto b_at = reinterpret_cast<uintptr_t>(b.const_data_ptr());
    return a_at < b_at + static_cast<uintptr_t>(bytes_of(b)) &&
           b_at < a_at + static_cast<uintptr_t>(bytes_of(a));
}

}  // namespace tp

#endif
