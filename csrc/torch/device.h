// SPDX-License-Identifier: Apache-2.0
// device.h -- a GPU while an operator uses it: device, stream and CUDA library.
//
// The one place that selects a device and asks torch for its stream.
#ifndef TP_DEVICE_H
#define TP_DEVICE_H

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch/tensor.h"

extern "C" {
#include "torch/cuda_library.h"
}

namespace tp
{

using torch::stable::accelerator::DeviceGuard;

using StreamOf = AOTITorchError (*)(int32_t, void **);

// torch's function for the current stream, or null where torch is built without CUDA.
// Found at run time, so that one build of this file serves both.
inline StreamOf
stream_of()
{
    static const StreamOf found = [] {
        void *torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return torch_cuda == nullptr
                   ? nullptr
                   : reinterpret_cast<StreamOf>(
                         dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
    }();
    return found;
}

inline constexpr const char *kNoCuda = "the installed torch is built without CUDA";

inline void
require_same_device(const Tensor &a, const Tensor &b)
{
    require(a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index(),
            "the tensors are on different devices; expected all on one GPU");
}

// A device selected for the life of this value, its current stream, and the library.
class Device
{
   public:
    explicit Device(const Tensor &tensor) : Device(tensor.get_device_index())
    {
    }

    explicit Device(int32_t index) : index_(index), guard_(index)
    {
        const tp_cuda_library *library = tp_cuda_library_open();
        if (library->api == nullptr)
            throw std::runtime_error(library->reason);
        if (stream_of() == nullptr)
            throw std::runtime_error(kNoCuda);
        api = library->api;
        STABLE_TORCH_ERROR_CODE_CHECK(stream_of()(index_, &stream));
    }

    // Throws where a launch has failed.
    void check(int error, const char *what) const
    {
        if (error != 0)
            throw std::runtime_error(
                std::string(what) +
                " could not be started on cuda:" + std::to_string(index_) + ": " +
                api->error_text(error) + " (CUDA error " + std::to_string(error) + ")");
    }

    const tp_cuda_api *api = nullptr;
    void *stream = nullptr;  // borrowed

   private:
    int32_t index_;
    DeviceGuard guard_;
};

}  // namespace tp

#endif
