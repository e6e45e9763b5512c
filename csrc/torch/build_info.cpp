// SPDX-License-Identifier: Apache-2.0
// build_info.cpp -- the operator that says how this library was built.
//
// It has the namespace's only STABLE_TORCH_LIBRARY, which torch refuses a second time:
// so two builds are not loaded into one process.
#include <torch/headeronly/version.h>

#include <tuple>

#include "torch/tensor.h"

namespace
{

// The compiler, the version of the torch headers, and the oldest torch that is served.
std::tuple<std::string, std::string, std::string>
build_info()
{
    constexpr uint64_t kTarget = TORCH_TARGET_VERSION;
    return {"compiler " __VERSION__, TORCH_VERSION,
            std::to_string(kTarget >> 56) + "." + std::to_string(kTarget >> 48 & 255)};
}

}  // namespace

STABLE_TORCH_LIBRARY(deepspeed_autotp, m)
{
    m.def("build_info() -> (str, str, str)");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CompositeExplicitAutograd, m)
{
    m.impl("build_info", TORCH_BOX(&build_info));
}
