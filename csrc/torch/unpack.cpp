// SPDX-License-Identifier: Apache-2.0
// unpack.cpp -- the operator that writes a shard back to its runs of the full tensor,
// on a CPU and on a GPU.
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
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CPU, m)
{
    m.impl("unpack_", TORCH_BOX(&unpack_on_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CUDA, m)
{
    m.impl("unpack_", TORCH_BOX(&unpack_on_gpu));
}
