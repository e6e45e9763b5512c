/* SPDX-License-Identifier: Apache-2.0 */
/* host_device.h -- functions that a CPU and a GPU have alike.
 *
 * What a kernel and a CPU work out in the same way stands in one inline function. nvcc
 * compiles it for both where it is told so; other compilers know a CPU alone. */
#ifndef TP_HOST_DEVICE_H
#define TP_HOST_DEVICE_H

#ifdef __CUDACC__
#define TP_HOST_DEVICE __host__ __device__
#else
#define TP_HOST_DEVICE
#endif

#endif
