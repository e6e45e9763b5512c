// SPDX-License-Identifier: Apache-2.0
// device_copies.h -- a list of strided copies that a kernel makes on a GPU.
#ifndef TP_DEVICE_COPIES_H
#define TP_DEVICE_COPIES_H

#include "torch/device.h"

extern "C" {
#include "pack/copies.h"
}

namespace tp
{

struct DeviceCopies {
    DeviceCopies() = default;
    DeviceCopies(const DeviceCopies &) = delete;
    DeviceCopies &operator=(const DeviceCopies &) = delete;
    ~DeviceCopies()
    {
        tp_copies_clear(&list);
    }

    // Adds what packs the runs of `full` to `shard`.
    void add_pack(const tp_shard_view &view, const Tensor &full, const Tensor &shard)
    {
        tp_error err = TP_NO_ERROR;
        if (tp_copies_pack(&list, &view, full.const_data_ptr(),
                           shard.mutable_data_ptr(), &err) < 0)
            raise(&err);
    }

    void start(const Device &device, bool in_order = false) const
    {
        const auto begin = in_order ? device.api->copy_in_order : device.api->copy;
        device.check(begin(list.items, list.count, device.stream), "a copy of runs");
    }

    tp_copies list = TP_NO_COPIES;
};

}  // namespace tp

#endif
