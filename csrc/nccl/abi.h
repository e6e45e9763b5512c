/* SPDX-License-Identifier: Apache-2.0 */
/* abi.h -- the functions of NCCL 2 that are used, and their arguments.
 *
 * NCCL's own header needs CUDA's, and the library is opened at run time. So the
 * constants and layouts that NCCL 2 keeps are here, as they are in src/nccl.h.in of
 * NCCL 2.14.3 (https://github.com/NVIDIA/nccl/blob/v2.14.3-1/src/nccl.h.in): an
 * ncclResult_t and an ncclDataType_t are ints, an ncclComm_t and a cudaStream_t
 * pointers. */
#ifndef TP_NCCL_ABI_H
#define TP_NCCL_ABI_H

#include <stddef.h>

enum {
    TP_NCCL_OLDEST = 21400, /* 2.14.0, the first with calls that do not block */
    TP_NCCL_ABOVE = 30000   /* 3.0.0, of which nothing is known */
};

/* Of ncclResult_t; the others are errors. */
enum { TP_NCCL_SUCCESS = 0, TP_NCCL_IN_PROGRESS = 7 };

/* ncclUint8 of ncclDataType_t. */
enum { TP_NCCL_BYTE = 1 };

/* ncclUniqueId; passed by value. */
enum { TP_NCCL_ID_BYTES = 128 };
typedef struct {
    char bytes[TP_NCCL_ID_BYTES];
} tp_nccl_id;

/* ncclConfig_t of 2.14. Later versions have more members behind these. They copy `size`
 * bytes, and take their defaults for what is younger than `version`. */
#define TP_NCCL_MAGIC 0xcafebeefU
typedef struct {
    size_t size;          /* of this struct */
    unsigned int magic;   /* TP_NCCL_MAGIC */
    unsigned int version; /* TP_NCCL_OLDEST */
    int blocking;         /* 0: calls return TP_NCCL_IN_PROGRESS and are polled */
} tp_nccl_config;

/* Each returns an ncclResult_t where nothing else is said. */
typedef struct {
    int (*get_version)(int *version);
    int (*get_id)(tp_nccl_id *id);
    int (*init)(void **comm, int ranks, tp_nccl_id id, int rank,
                tp_nccl_config *config);
    int (*async_error)(void *comm, int *result);
    int (*abort)(void *comm);
    int (*finalize)(void *comm);
    int (*destroy)(void *comm);
    int (*group_start)(void);
    int (*group_end)(void);
    int (*send)(const void *at, size_t count, int type, int peer, void *comm,
                void *stream);
    int (*receive)(void *at, size_t count, int type, int peer, void *comm,
                   void *stream);
    const char *(*error_text)(int result); /* of a result, in general */
    const char *(*last_error)(void *comm); /* of what failed last, in detail */
} tp_nccl_functions;

#endif
