/* SPDX-License-Identifier: Apache-2.0 */
/* launch.h -- starts kernels by a call of CUDA's runtime.
 *
 * A call, where <<<>>> is no C++: tests/emulated/cuda_runtime has a runtime with which
 * a CPU compiles and runs the .cu files as they are. For it, __grid_constant__ is
 * behind the type of a parameter, where it can be made a reference. */
#ifndef TP_LAUNCH_H
#define TP_LAUNCH_H

#include <cuda_runtime.h>
#include <stdint.h>

namespace tp
{

/* Returns `error` and clears it, so that the next call does not find it again. */
inline cudaError_t
reported(cudaError_t error)
{
    if (error != cudaSuccess)
        (void)cudaGetLastError();
    return error;
}

/* Start `kernel` with `args` in 1 to 2^31 - 1 blocks of `threads` threads. */
template <typename... Params, typename... Args>
cudaError_t
launch(void (*kernel)(Params...), int64_t blocks, int threads, void *stream,
       const Args &...args)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    return reported(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace tp

#endif
