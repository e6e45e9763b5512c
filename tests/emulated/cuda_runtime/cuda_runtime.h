// SPDX-License-Identifier: Apache-2.0
// cuda_runtime.h -- what the .cu files use of CUDA, for a compiler without CUDA.
//
// Stands in for CUDA's header of this name. Kernels run when they are launched, block
// by block, each thread as a fiber that others take turns with; see runtime.cpp. What a
// GPU would not define is said, and ends the process. Arithmetic is the CPU's, since
// __CUDACC__ and __CUDA_ARCH__ stay undefined.
#ifndef TP_EMULATED_CUDA_RUNTIME_H
#define TP_EMULATED_CUDA_RUNTIME_H

#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
// One object for all threads of a grid: a parameter becomes a reference to it.
#define __grid_constant__ &
// One object for each block, as blocks run one after the other. runtime.cpp finds all
// of them in the library's thread-local memory, and spoils them ahead of every block.
#define __shared__ static thread_local

struct dim3 {
    constexpr dim3(unsigned across = 1, unsigned down = 1, unsigned deep = 1)
        : x(across), y(down), z(deep)
    {
    }
    unsigned x, y, z;
};

// Of one dimension, as all launches of this library are.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// The size of a kernel's arguments that every architecture from 7.0 on takes.
constexpr std::size_t kMostArguments = 32764;

typedef enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600
} cudaError_t;

typedef struct CUstream_st *cudaStream_t;

struct cudaFuncAttributes {
    int maxThreadsPerBlock;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
};

cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaStreamQuery(cudaStream_t stream);
const char *cudaGetErrorString(cudaError_t error);
void __syncthreads();

namespace emulated
{

cudaError_t launch(const cudaLaunchConfig_t &config,
                   const std::function<void()> &kernel);
// What the lane `apart` away, exclusive or, gives of the same shuffle.
uint64_t exchange(unsigned mask, uint64_t value, int apart);
cudaError_t attributes();

}  // namespace emulated

template <typename Kernel>
cudaError_t
cudaFuncGetAttributes(cudaFuncAttributes *attributes, Kernel *)
{
    *attributes = {1024};
    return emulated::attributes();
}

template <typename... Params, typename... Args>
cudaError_t
cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Params...),
                   Args &&...args)
{
    static_assert((sizeof(Params) + ... + 0) <= kMostArguments,
                  "arguments of a kernel");
    const std::tuple<std::decay_t<Params>...> kept(std::forward<Args>(args)...);
    return emulated::launch(*config, [&] { std::apply(kernel, kept); });
}

template <typename Word>
Word
__ldcs(const Word *from)
{
    return *from;
}

template <typename Word>
void
__stcs(Word *to, Word word)
{
    *to = word;
}

template <typename Value>
Value
__shfl_xor_sync(unsigned mask, Value value, int apart)
{
    static_assert(sizeof(Value) == 4 || sizeof(Value) == 8, "what a shuffle takes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(value));
    bits = emulated::exchange(mask, bits, apart);
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

#endif
