// SPDX-License-Identifier: Apache-2.0
// tensor.h -- what the operators for every device share: arguments and errors.
//
// Included in csrc/torch alone. See pack.cpp.
#ifndef TP_BRIDGE_H
#define TP_BRIDGE_H

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
#include "pack/compact.h"
#include "pack/shard.h"
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

inline tp_shard_cut
make_cut(int64_t outer, int64_t size, int64_t inner, const std::vector<int64_t> &runs)
{
    return {outer, size, inner, 0, runs.data(), static_cast<int64_t>(runs.size())};
}

inline void
check_cut(const tp_shard_cut &cut, int64_t full_items, int64_t shard_items,
          bool disjoint)
{
    tp_error err = TP_NO_ERROR;
    if (tp_shard_check(&cut, full_items, shard_items, &err) < 0)
        raise(&err);
    if (disjoint && tp_shard_disjoint(&cut, &err) < 0)
        raise(&err);
}

inline int64_t
count_items(const std::vector<int64_t> &shape)
{
    int64_t items = 1;
    for (const int64_t size : shape)
        require(size >= 0 && !__builtin_mul_overflow(items, size, &items),
                "the shape of the shard has a negative size or too many elements");
    return items;
}

// torch's own number of the dtype; Tensor::scalar_type() refuses the rarer ones.
inline int32_t
dtype_of(const Tensor &tensor)
{
    int32_t dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    return dtype;
}

// A new tensor of the dtype and device of `like`. Made without the dispatcher, which
// takes half of the time where thousands of small tensors are cut.
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
    const uintptr_t a_bytes = static_cast<uintptr_t>(a.numel()) * a.element_size();
    const uintptr_t b_bytes = static_cast<uintptr_t>(b.numel()) * b.element_size();
    return a_at < b_at + b_bytes && b_at < a_at + a_bytes;
}

// A cut that packs `full` to `shape`, checked.
inline tp_shard_cut
packing(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
        const std::vector<int64_t> &runs, const std::vector<int64_t> &shape)
{
    tp_shard_cut cut = make_cut(outer, size, inner, runs);
    check_cut(cut, full.numel(), count_items(shape), false);
    require(full.is_contiguous(), "pack takes a contiguous full tensor");
    cut.item = static_cast<int64_t>(full.element_size());
    return cut;
}

// A cut that writes `shard` back to its runs, checked.
inline tp_shard_cut
unpacking(const Tensor &full, const Tensor &shard, int64_t outer, int64_t size,
          int64_t inner, const std::vector<int64_t> &runs)
{
    tp_shard_cut cut = make_cut(outer, size, inner, runs);
    check_cut(cut, full.numel(), shard.numel(), true);
    require(full.is_contiguous() && shard.is_contiguous(),
            "unpack_ takes a contiguous full tensor and a contiguous shard");
    require(dtype_of(full) == dtype_of(shard),
            "unpack_ takes a shard of the full tensor's dtype");
    require(!share_memory(full, shard),
            "unpack_ takes a shard that shares no memory with the full tensor");
    cut.item = static_cast<int64_t>(full.element_size());
    return cut;
}

// A cut that packs `full` in place, checked.
inline tp_shard_cut
compacting(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
           const std::vector<int64_t> &runs, const std::vector<int64_t> &shape)
{
    const tp_shard_cut cut = packing(full, outer, size, inner, runs, shape);
    tp_error err = TP_NO_ERROR;
    if (tp_compact_check(&cut, &err) < 0)
        raise(&err);
    return cut;
}

// The cuts of many tensors as one list of numbers: for each of them outer, size, inner,
// the number of values in its runs, the number of its dimensions, the runs, the shape.
class Table
{
   public:
    explicit Table(const std::vector<int64_t> &numbers) : numbers_(numbers)
    {
    }

    // Reads the next cut; `runs` and `shape` are valid until the next call.
    void read()
    {
        const std::vector<int64_t> head = take(5);
        outer = head[0];
        size = head[1];
        inner = head[2];
        runs = take(head[3]);
        shape = take(head[4]);
    }

    bool ended() const
    {
        return at_ == numbers_.size();
    }

    int64_t outer = 0;
    int64_t size = 0;
    int64_t inner = 0;
    std::vector<int64_t> runs;
    std::vector<int64_t> shape;

   private:
    std::vector<int64_t> take(int64_t count)
    {
        require(count >= 0 && static_cast<uint64_t>(count) <= numbers_.size() - at_,
                "the table of cuts ends early");
        const auto from = numbers_.begin() + static_cast<std::ptrdiff_t>(at_);
        at_ += static_cast<size_t>(count);
        return {from, from + static_cast<std::ptrdiff_t>(count)};
    }

    const std::vector<int64_t> &numbers_;
    size_t at_ = 0;
};

}  // namespace tp

#endif
