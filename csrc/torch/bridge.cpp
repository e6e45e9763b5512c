// SPDX-License-Identifier: Apache-2.0
// bridge.cpp -- torch operators around shard.c, on the stable ABI of LibTorch.
//
// The only file that includes torch headers. It adapts arguments, allocates the
// result and hands ranges to torch's threads; it decides nothing. An operator reports
// failure to the dispatcher by an exception, so the operators cannot be noexcept;
// raise() is the one place that makes one. What torch's threads call is noexcept.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
#include "shard.h"
}

namespace
{

using torch::stable::Tensor;

// Work is dealt out in pages, so that two threads never write to one cache line.
constexpr int64_t kPage = 4096;
// 1 MiB takes some 50 us to copy, several times the cost of waking a thread.
constexpr int64_t kGrain = 256;

// One copy as torch's threads see it; lives on the stack of the operator.
struct Copy {
    tp_shard_cut cut;
    const void *source;  // borrowed
    void *target;        // borrowed
    int64_t bytes;       // of the shard
};

// Throws what `err` says and releases it. torch turns invalid_argument into
// ValueError and bad_alloc into MemoryError.
[[noreturn]] void
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

void
require(bool holds, const char *message)
{
    if (!holds)
        throw std::invalid_argument(message);
}

tp_shard_cut
make_cut(int64_t outer, int64_t size, int64_t inner, const std::vector<int64_t> &runs)
{
    return {outer, size, inner, 0, runs.data(), static_cast<int64_t>(runs.size())};
}

void
check_cut(const tp_shard_cut &cut, int64_t full_items, int64_t shard_items,
          bool disjoint)
{
    tp_error err = TP_NO_ERROR;
    if (tp_shard_check(&cut, full_items, shard_items, &err) < 0)
        raise(&err);
    if (disjoint && tp_shard_disjoint(&cut, &err) < 0)
        raise(&err);
}

int64_t
count_items(const std::vector<int64_t> &shape)
{
    int64_t items = 1;
    for (const int64_t size : shape)
        require(size >= 0 && !__builtin_mul_overflow(items, size, &items),
                "the shape of the shard has a negative size or too many elements");
    return items;
}

void
pack_pages(int64_t begin, int64_t end, void *context) noexcept
{
    const Copy &copy = *static_cast<const Copy *>(context);
    const int64_t stop = end * kPage < copy.bytes ? end * kPage : copy.bytes;
    tp_shard_pack(&copy.cut, copy.source, copy.target, begin * kPage, stop);
}

void
unpack_pages(int64_t begin, int64_t end, void *context) noexcept
{
    const Copy &copy = *static_cast<const Copy *>(context);
    const int64_t stop = end * kPage < copy.bytes ? end * kPage : copy.bytes;
    tp_shard_unpack(&copy.cut, copy.target, copy.source, begin * kPage, stop);
}

// torch's own number of the dtype; Tensor::scalar_type() refuses the rarer ones.
int32_t
dtype_of(const Tensor &tensor)
{
    int32_t dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    return dtype;
}

bool
share_memory(const Tensor &a, const Tensor &b)
{
    const auto a_at = reinterpret_cast<uintptr_t>(a.const_data_ptr());
    const auto b_at = reinterpret_cast<uintptr_t>(b.const_data_ptr());
    const uintptr_t a_bytes = static_cast<uintptr_t>(a.numel()) * a.element_size();
    const uintptr_t b_bytes = static_cast<uintptr_t>(b.numel()) * b.element_size();
    return a_at < b_at + b_bytes && b_at < a_at + a_bytes;
}

void
run_copy(Copy *copy, ParallelFunc pages)
{
    const int64_t count = copy->bytes / kPage + (copy->bytes % kPage != 0);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, kGrain, pages, copy));
}

Tensor
pack(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
     std::vector<int64_t> runs, std::vector<int64_t> shape)
{
    tp_shard_cut cut = make_cut(outer, size, inner, runs);
    check_cut(cut, full.numel(), count_items(shape), false);
    require(full.is_contiguous(), "pack takes a contiguous full tensor");
    cut.item = static_cast<int64_t>(full.element_size());

    Tensor shard = torch::stable::new_empty(full, shape);
    Copy copy = {cut, full.const_data_ptr(), shard.mutable_data_ptr(),
                 tp_shard_bytes(&cut)};
    tp_shard_expect(copy.target, copy.bytes);
    run_copy(&copy, pack_pages);
    return shard;
}

void
unpack(const Tensor &full, const Tensor &shard, int64_t outer, int64_t size,
       int64_t inner, std::vector<int64_t> runs)
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

    Copy copy = {cut, shard.const_data_ptr(), full.mutable_data_ptr(),
                 tp_shard_bytes(&cut)};
    run_copy(&copy, unpack_pages);
}

void
check(int64_t outer, int64_t size, int64_t inner, std::vector<int64_t> runs,
      int64_t full_items, int64_t shard_items, bool disjoint)
{
    check_cut(make_cut(outer, size, inner, runs), full_items, shard_items, disjoint);
}

}  // namespace

STABLE_TORCH_LIBRARY(deepspeed_autotp, m)
{
    m.def(
        "pack(Tensor full, int outer, int size, int inner, int[] runs, int[] shape)"
        " -> Tensor");
    m.def(
        "unpack_(Tensor(a!) full, Tensor shard, int outer, int size, int inner,"
        " int[] runs) -> ()");
    m.def(
        "check(int outer, int size, int inner, int[] runs, int full_items,"
        " int shard_items, bool disjoint) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CPU, m)
{
    m.impl("pack", TORCH_BOX(&pack));
    m.impl("unpack_", TORCH_BOX(&unpack));
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CompositeExplicitAutograd, m)
{
    m.impl("check", TORCH_BOX(&check));
}
