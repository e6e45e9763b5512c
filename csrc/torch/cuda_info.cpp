// SPDX-License-Identifier: Apache-2.0
// cuda_info.cpp -- the operators that say what there is of CUDA: library, devices, and
// whether the kernels run on one.
#include <tuple>

#include "torch/device.h"

namespace
{

using namespace tp;

// Why there is no library, its file, its architectures and its toolkit.
std::tuple<std::string, std::string, std::string, int64_t>
cuda_library()
{
    const tp_cuda_library *library = tp_cuda_library_open();
    if (library->api == nullptr)
        return {library->reason, library->path, "", 0};
    return {"", library->path, library->api->archs, library->api->toolkit};
}

// How many devices the library sees, and the CUDA error with its text, 0 for none.
std::tuple<int64_t, int64_t, std::string>
cuda_devices()
{
    const tp_cuda_library *library = tp_cuda_library_open();
    if (library->api == nullptr)
        throw std::runtime_error(library->reason);
    int count = 0;
    const int error = library->api->devices(&count);
    return {count, error, error == 0 ? "" : library->api->error_text(error)};
}

// Why the kernels do not run on a device; empty where they do. Makes a context there,
// which a device that is full, or in exclusive use, refuses.
std::string
cuda_probe(int64_t index)
{
    const tp_cuda_library *library = tp_cuda_library_open();
    if (library->api == nullptr)
        return library->reason;
    if (stream_of() == nullptr)
        return kNoCuda;
    int error = 0;
    try {
        const DeviceGuard guard(static_cast<int32_t>(index));
        error = library->api->probe();
    } catch (const std::exception &refusal) {
        return std::string("the device cannot be selected: ") + refusal.what();
    }
    if (error == 0)
        return "";
    return "its CUDA library has code for the architectures " +
           std::string(library->api->archs) + ": " + library->api->error_text(error) +
           " (CUDA error " + std::to_string(error) + ")";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def("cuda_library() -> (str, str, str, int)");
    m.def("cuda_devices() -> (int, int, str)");
    m.def("cuda_probe(int index) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CompositeExplicitAutograd, m)
{
    m.impl("cuda_library", TORCH_BOX(&cuda_library));
    m.impl("cuda_devices", TORCH_BOX(&cuda_devices));
    m.impl("cuda_probe", TORCH_BOX(&cuda_probe));
}
