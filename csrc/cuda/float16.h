/* SPDX-License-Identifier: Apache-2.0 */
/* float16.h -- 16-bit floats in memory, read as float32 and rounded to.
 *
 * C++ that a GPU, which has instructions for it, and a CPU compile alike. */
#ifndef TP_FLOAT16_H
#define TP_FLOAT16_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define TP_INLINE __host__ __device__ __forceinline__
#else
#define TP_INLINE inline
#endif

#ifdef __CUDA_ARCH__
#define TP_UNROLL _Pragma("unroll")
#else
#define TP_UNROLL
#endif

namespace tp
{

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

TP_INLINE float
from_bits(uint32_t bits)
{
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
#endif
}

TP_INLINE float
value_of(float x)
{
    return x;
}

TP_INLINE float
value_of(BFloat16 x)
{
    return from_bits(static_cast<uint32_t>(x.bits) << 16);
}

TP_INLINE float
value_of(Half x)
{
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(x.bits));
#else
    const uint32_t sign = (x.bits & 0x8000u) << 16;
    const uint32_t size = x.bits & 0x7fffu;
    if (size >= 0x7c00u) /* infinite or NaN */
        return from_bits(sign | 0x7f800000u | (size & 0x3ffu) << 13);
    if (size < 0x400u) /* subnormal: a multiple of 2^-24 */
        return (sign ? -1.0f : 1.0f) * static_cast<float>(size) *
               5.9604644775390625e-8f;
    return from_bits(sign | ((size << 13) + 0x38000000u));
#endif
}

/* To the nearest, ties to even, as torch rounds. */
TP_INLINE void
assign(float *to, float x)
{
    *to = x;
}

TP_INLINE void
assign(BFloat16 *to, float x)
{
#ifdef __CUDA_ARCH__
    to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    if (x != x)
        to->bits = 0x7fc0;
    else
        to->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
}

TP_INLINE void
assign(Half *to, float x)
{
#ifdef __CUDA_ARCH__
    to->bits = __half_as_ushort(__float2half_rn(x));
#else
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const float size = fabsf(x);
    if (x != x)
        to->bits = 0x7fff;
    else if (size >= 65520.0f)
        to->bits = static_cast<uint16_t>(sign | 0x7c00u);
    else if (size <
             6.103515625e-5f) /* subnormal; the rounding mode is to nearest even */
        to->bits = static_cast<uint16_t>(
            sign | static_cast<uint16_t>(nearbyintf(size * 16777216.0f)));
    else {
        bits = (bits & 0x7fffffffu) - 0x38000000u;
        to->bits =
            static_cast<uint16_t>(sign | (bits + 0xfffu + (bits >> 13 & 1)) >> 13);
    }
#endif
}

/* Two neighbours in memory, by one instruction where there is one. */
TP_INLINE void
assign_two(float *to, float a, float b)
{
    assign(to, a);
    assign(to + 1, b);
}

TP_INLINE void
assign_two(BFloat16 *to, float a, float b)
{
#ifdef __CUDA_ARCH__
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    memcpy(to, &both, sizeof(both));
#else
    assign(to, a);
    assign(to + 1, b);
#endif
}

TP_INLINE void
assign_two(Half *to, float a, float b)
{
#ifdef __CUDA_ARCH__
    const __half2 both = __floats2half2_rn(a, b);
    memcpy(to, &both, sizeof(both));
#else
    assign(to, a);
    assign(to + 1, b);
#endif
}

}  // namespace tp

#endif
