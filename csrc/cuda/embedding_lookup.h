/* SPDX-License-Identifier: Apache-2.0 */
/* embedding_lookup.h -- a lookup of rows, started on a GPU. */
#ifndef TP_CUDA_EMBEDDING_LOOKUP_H
#define TP_CUDA_EMBEDDING_LOOKUP_H

#include "pack/embedding_lookup.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Look up all tokens on `stream`, a cudaStream_t of the current device. Where an
 * id is outside of the vocabulary all bits of the row are set, which is NaN in the
 * floating types of 16 bits and more. Returns a cudaError_t. */
int tp_lookup_start(const tp_lookup *lookup, void *stream);

#ifdef __cplusplus
}
#endif

#endif
