/* SPDX-License-Identifier: Apache-2.0 */
/* api.h -- what libautotp_cuda.so offers: one table, found by one name.
 *
 * Includes no CUDA header, so that what opens the library builds without CUDA: a
 * cudaError_t is an int here, and a cudaStream_t a void pointer. */
#ifndef TP_CUDA_API_H
#define TP_CUDA_API_H

#include "cuda/copy.h"
#include "cuda/cross_entropy.h"
#include "cuda/embedding_lookup.h"

/* Goes up with every change of the table or of a struct that it speaks of. */
enum { TP_CUDA_ABI = 3 };

#define TP_CUDA_ENTRY "tp_cuda_api_get"

typedef struct {
    int32_t abi;     /* TP_CUDA_ABI of the library; the first member in every version */
    int32_t toolkit; /* CUDART_VERSION, 13000 for 13.0 */
    const char *archs; /* as the build was told: "75,80,90" */
    /* How many devices there are; an error such as 35, no driver, without any. */
    int (*devices)(int *count);
    /* Whether the kernels run on the current device. */
    int (*probe)(void);
    /* The text of an error; never NULL. Clears nothing. */
    const char *(*error_text)(int error);
    int (*copy)(tp_copy *copies, int64_t count, void *stream);
    int (*copy_in_order)(tp_copy *copies, int64_t count, void *stream);
    int (*cross_entropy_statistics)(const tp_cross_entropy_args *args, void *stream);
    int (*cross_entropy_gradient)(const tp_cross_entropy_args *args, void *stream);
    /* 1 when all that was started on it is done, 0 when not yet, and a negative CUDA
     * error. Waits for nothing. */
    int (*stream_done)(void *stream);
    int (*lookup)(const tp_lookup *lookup, void *stream);
} tp_cuda_api;

/* The table; never fails, and touches no device. */
typedef const tp_cuda_api *(*tp_cuda_entry)(void);

#endif
