// SPDX-License-Identifier: Apache-2.0
// unpack.cpp -- the operators that write a shard back to its runs of the full tensor,
// or of a part of its bytes, on a CPU and on a GPU.
#include "torch/cpu_copies.h"
#include "torch/device_copies.h"

namespace
{

using namespace tp;

tp_shard_view
view_to_unpack(const Tensor &full, const Tensor &shard, int64_t outer, int64_t size,
               int64_t inner, const std::vector<int64_t> &runs)
{
    tp_shard_view view = make_view(outer, size, inner, runs);
    check_view(view, full.numel(), shard.numel(), true);
    require(full.is_contiguous() && shard.is_contiguous(),
            "full or shard is not contiguous; call .contiguous() first");
    require(dtype_of(full) == dtype_of(shard),
            "shard has another dtype than full; call shard.to(full.dtype) first");
    require(!share_memory(full, shard),
            "shard shares memory with full; call shard.clone() first");
    view.item = static_cast<int64_t>(full.element_size());
    return view;
}

void
unpack_pages(int64_t begin, int64_t end, void *context) noexcept
{
    const CpuCopy &copy = *static_cast<const CpuCopy *>(context);
    tp_shard_unpack(&copy.view, copy.target, copy.source, begin * kPage,
                    copy.end_of(end));
}

void
unpack_on_cpu(const Tensor &full, const Tensor &shard, int64_t outer, int64_t size,
              int64_t inner, std::vector<int64_t> runs)
{
    const tp_shard_view view = view_to_unpack(full, shard, outer, size, inner, runs);
    CpuCopy copy = {view, shard.const_data_ptr(), full.mutable_data_ptr(),
                    tp_shard_bytes(&view)};
    copy.run(unpack_pages);
}

void
unpack_window_pages(int64_t begin, int64_t end, void *context) noexcept
{
    const CpuCopy &copy = *static_cast<const CpuCopy *>(context);
    tp_shard_unpack_window(&copy.view, static_cast<char *>(copy.target) + begin * kPage,
                           copy.source, copy.begin + begin * kPage,
                           copy.begin + copy.end_of(end));
}

// Writes into `part`, bytes of the full tensor from byte `begin` on, those that `shard`
// has of them.
void
unpack_part_on_cpu(const Tensor &part, const Tensor &shard, int64_t outer, int64_t size,
                   int64_t inner, std::vector<int64_t> runs, int64_t begin)
{
    const std::vector<int64_t> full = {outer, size, inner};
    const int64_t items = count_items(full);
    const int64_t item = static_cast<int64_t>(shard.element_size());
    tp_shard_view view = make_view(outer, size, inner, runs);
    check_view(view, items, shard.numel(), true);
    view.item = item;
    int64_t bytes = 0;
    require(!__builtin_mul_overflow(items, item, &bytes),
            "the full tensor has 2^63 bytes or more");
    require(part.is_cpu() && part.is_contiguous() && part.element_size() == 1,
            "part: expected a contiguous tensor of bytes on the CPU");
    require(shard.is_contiguous(),
            "shard is not contiguous; call shard.contiguous() first");
    require(
        begin >= 0 && begin <= bytes && part.numel() <= bytes - begin,
        "part and begin: expected bytes of the full tensor, got some after its end");
    require(!share_memory(part, shard),
            "shard shares memory with part; expected memory of its own");
    CpuCopy copy = {view, shard.const_data_ptr(), part.mutable_data_ptr(), part.numel(),
                    begin};
    copy.run(unpack_window_pages);
}

void
unpack_on_gpu(const Tensor &full, const Tensor &shard, int64_t outer, int64_t size,
              int64_t inner, std::vector<int64_t> runs)
{
    const tp_shard_view view = view_to_unpack(full, shard, outer, size, inner, runs);
    require_same_device(full, shard);
    const Device device(full);
    DeviceCopies copies;
    tp_error err = TP_NO_ERROR;
    if (tp_copies_unpack(&copies.list, &view, full.mutable_data_ptr(),
                         shard.const_data_ptr(), &err) < 0)
        raise(&err);
    copies.start(device);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def(
        "unpack_(Tensor(a!) full, Tensor shard, int outer, int size, int inner,"
        " int[] runs) -> ()");
    m.def(
        "unpack_part_(Tensor(a!) part, Tensor shard, int outer, int size, int inner,"
        " int[] runs, int begin) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CPU, m)
{
    m.impl("unpack_", TORCH_BOX(&unpack_on_cpu));
    m.impl("unpack_part_", TORCH_BOX(&unpack_part_on_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CUDA, m)
{
    m.impl("unpack_", TORCH_BOX(&unpack_on_gpu));
}
