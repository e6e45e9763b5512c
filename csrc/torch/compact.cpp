// SPDX-License-Identifier: Apache-2.0
// compact.cpp -- the operator that packs a shard in the memory of the full tensor, on a
// CPU and on a GPU.
#include "torch/device_copies.h"
#include "torch/runs.h"

namespace
{

using namespace tp;

tp_shard_view
view_to_compact(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
                const std::vector<int64_t> &runs, const std::vector<int64_t> &shape)
{
    const tp_shard_view view = view_to_pack(full, outer, size, inner, runs, shape);
    tp_error err = TP_NO_ERROR;
    if (tp_compact_check(&view, &err) < 0)
        raise(&err);
    return view;
}

void
compact_on_cpu(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
               std::vector<int64_t> runs, std::vector<int64_t> shape)
{
    const tp_shard_view view = view_to_compact(full, outer, size, inner, runs, shape);
    tp_compact_on_cpu(&view, full.mutable_data_ptr());
}

void
compact_on_gpu(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
               std::vector<int64_t> runs, std::vector<int64_t> shape)
{
    const tp_shard_view view = view_to_compact(full, outer, size, inner, runs, shape);
    const Device device(full);
    tp_compaction at = {&view, 0, 0, 0};
    tp_compact_step step;
    while (tp_compact_next(&at, &step)) {
        DeviceCopies copies;
        tp_error err = TP_NO_ERROR;
        if (tp_compact_copies(&step, full.mutable_data_ptr(), &copies.list, &err) < 0)
            raise(&err);
        copies.start(device, step.in_order);
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def(
        "compact_(Tensor(a!) full, int outer, int size, int inner, int[] runs,"
        " int[] shape) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CPU, m)
{
    m.impl("compact_", TORCH_BOX(&compact_on_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CUDA, m)
{
    m.impl("compact_", TORCH_BOX(&compact_on_gpu));
}
