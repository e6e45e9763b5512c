/* SPDX-License-Identifier: Apache-2.0 */
/* cuda_library.h -- libautotp_cuda.so, opened when it is first asked for.
 *
 * Opening it touches no device and needs no driver. A library that is missing or does
 * not fit is no error here: the caller is told why, and does without. */
#ifndef TP_CUDA_LIBRARY_H
#define TP_CUDA_LIBRARY_H

#include "cuda/api.h"

typedef struct {
    const tp_cuda_api *api; /* NULL where there is no library to use */
    const char *reason;     /* why there is none; empty where there is one */
    const char *path;       /* where it was looked for */
} tp_cuda_library;

/* The library beside this one, or the file that AUTOTP_CUDA_LIBRARY names, which is
 * empty to use none. Never NULL; the same for the life of the process. */
const tp_cuda_library *tp_cuda_library_open(void);

#endif
