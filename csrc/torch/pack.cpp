// SPDX-License-Identifier: Apache-2.0
// pack.cpp -- the operators that copy the runs of a full tensor to a new shard, on a
// CPU and on a GPU.
#include "torch/cpu_copies.h"
#include "torch/device_copies.h"

namespace
{

using namespace tp;

void
pack_pages(int64_t begin, int64_t end, void *context) noexcept
{
    const CpuCopy &copy = *static_cast<const CpuCopy *>(context);
    tp_shard_pack(&copy.view, copy.source, copy.target, begin * kPage,
                  copy.end_of(end));
}

void
pack_part_pages(int64_t begin, int64_t end, void *context) noexcept
{
    const CpuCopy &copy = *static_cast<const CpuCopy *>(context);
    tp_shard_part(&copy.view, copy.source,
                  static_cast<char *>(copy.target) + begin * kPage,
                  copy.begin + begin * kPage, copy.begin + copy.end_of(end));
}

Tensor
pack_checked(const Tensor &full, const tp_shard_view &view,
             const std::vector<int64_t> &shape)
{
    Tensor shard = new_like(full, shape);
    CpuCopy copy = {view, full.const_data_ptr(), shard.mutable_data_ptr(),
                    tp_shard_bytes(&view)};
    tp_shard_expect(copy.target, copy.bytes);
    copy.run(pack_pages);
    return shard;
}

Tensor
pack_on_cpu(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
            std::vector<int64_t> runs, std::vector<int64_t> shape)
{
    return pack_checked(full, view_to_pack(full, outer, size, inner, runs, shape),
                        shape);
}

std::vector<Tensor>
pack_many_on_cpu(std::vector<Tensor> fulls, std::vector<int64_t> slices)
{
    RunsTable table(slices);
    std::vector<Tensor> shards;
    shards.reserve(fulls.size());
    for (const Tensor &full : fulls) {
        const tp_shard_view view = table.next(full);
        shards.push_back(pack_checked(full, view, table.shape));
    }
    table.require_end();
    return shards;
}

// Fills `part`, bytes, with those of the shard from byte `begin` on.
void
pack_part_on_cpu(const Tensor &part, const Tensor &full, int64_t outer, int64_t size,
                 int64_t inner, std::vector<int64_t> runs, std::vector<int64_t> shape,
                 int64_t begin)
{
    const tp_shard_view view = view_to_pack(full, outer, size, inner, runs, shape);
    require(part.is_cpu() && part.is_contiguous() && part.element_size() == 1,
            "part: expected a contiguous tensor of bytes on the CPU");
    require(begin >= 0 && begin <= tp_shard_bytes(&view) &&
                part.numel() <= tp_shard_bytes(&view) - begin,
            "part and begin: expected bytes of the shard, got some after its end");
    require(!share_memory(full, part),
            "part shares memory with full; expected memory of its own");
    CpuCopy copy = {view, full.const_data_ptr(), part.mutable_data_ptr(), part.numel(),
                    begin};
    copy.run(pack_part_pages);
}

Tensor
pack_on_gpu(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
            std::vector<int64_t> runs, std::vector<int64_t> shape)
{
    const tp_shard_view view = view_to_pack(full, outer, size, inner, runs, shape);
    const Device device(full);
    Tensor shard = new_like(full, shape);
    DeviceCopies copies;
    copies.add_pack(view, full, shard);
    copies.start(device);
    return shard;
}

std::vector<Tensor>
pack_many_on_gpu(std::vector<Tensor> fulls, std::vector<int64_t> slices)
{
    RunsTable table(slices);
    std::vector<Tensor> shards;
    if (fulls.empty())
        return shards;
    const Device device(fulls[0]);
    DeviceCopies copies;
    shards.reserve(fulls.size());
    for (const Tensor &full : fulls) {
        const tp_shard_view view = table.next(full);
        require_same_device(full, fulls[0]);
        shards.push_back(new_like(full, table.shape));
        copies.add_pack(view, full, shards.back());
    }
    table.require_end();
    copies.start(device);
    return shards;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def(
        "pack(Tensor full, int outer, int size, int inner, int[] runs, int[] shape)"
        " -> Tensor");
    m.def("pack_many(Tensor[] fulls, int[] slices) -> Tensor[]");
    m.def(
        "pack_part_(Tensor(a!) part, Tensor full, int outer, int size, int inner,"
        " int[] runs, int[] shape, int begin) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CPU, m)
{
    m.impl("pack", TORCH_BOX(&pack_on_cpu));
    m.impl("pack_many", TORCH_BOX(&pack_many_on_cpu));
    m.impl("pack_part_", TORCH_BOX(&pack_part_on_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CUDA, m)
{
    m.impl("pack", TORCH_BOX(&pack_on_gpu));
    m.impl("pack_many", TORCH_BOX(&pack_many_on_gpu));
}
