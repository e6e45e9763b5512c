/* SPDX-License-Identifier: Apache-2.0 */
/* api.cu -- the table of libautotp_cuda.so; all else in the library is hidden. */
#include "cuda/api.h"

#include "cuda/launch.h"

namespace
{

int
devices(int *count)
{
    *count = 0;
    return tp::reported(cudaGetDeviceCount(count));
}

const char *
error_text(int error)
{
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int
stream_done(void *stream)
{
    const cudaError_t error =
        tp::reported(cudaStreamQuery(static_cast<cudaStream_t>(stream)));
    if (error == cudaSuccess)
        return 1;
    return error == cudaErrorNotReady ? 0 : -static_cast<int>(error);
}

const tp_cuda_api kApi = {
    TP_CUDA_ABI,
    CUDART_VERSION,
    AUTOTP_ARCHS,
    devices,
    tp_copy_probe,
    error_text,
    tp_copy_start,
    tp_copy_start_in_order,
    tp_cross_entropy_statistics,
    tp_cross_entropy_gradient,
    stream_done,
    tp_lookup_start,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const tp_cuda_api *
tp_cuda_api_get(void)
{
    return &kApi;
}
