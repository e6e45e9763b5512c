/* SPDX-License-Identifier: Apache-2.0 */
/* copy.h -- lists of strided copies, started on a GPU. */
#ifndef TP_CUDA_COPY_H
#define TP_CUDA_COPY_H

#include "pack/copy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Start the copies on `stream`, a cudaStream_t of the current device. They may run in
 * any order. The list is free to be changed or released on return. Returns a
 * cudaError_t. */
int tp_copy_start(tp_copy *copies, int64_t count, void *stream);

/* The same in the order of the list and of addresses: a byte is written after all bytes
 * up to it are read. For moves inside of a tensor, to lower addresses. */
int tp_copy_start_in_order(tp_copy *copies, int64_t count, void *stream);

/* Whether the current device runs what the library was compiled to. One kernel stands
 * for all of them: they are compiled for the same architectures. */
int tp_copy_probe(void);

#ifdef __cplusplus
}
#endif

#endif
