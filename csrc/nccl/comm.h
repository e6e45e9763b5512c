/* SPDX-License-Identifier: Apache-2.0 */
/* comm.h -- a communicator of NCCL's: made, waited for, aborted, closed.
 *
 * No call of NCCL's blocks: each is started and then polled until it is done or the
 * timeout is over. A communicator that has failed is aborted at once, so that
 * nothing runs on its stream any more, and every later call fails. One thread uses it.
 */
#ifndef TP_NCCL_COMM_H
#define TP_NCCL_COMM_H

#include "nccl/loader.h"

typedef struct tp_comm tp_comm;

typedef struct {
    int rank;
    int ranks;
    double seconds; /* timeout of an exchange */
} tp_comm_place;

/* A CUDA stream, or what stands for one. */
typedef struct {
    void *at; /* borrowed */
    /* 1 when all that was started on it is done, 0 when not yet, and a negative CUDA
     * error. */
    int (*done)(void *at);
} tp_stream;

/* Make a communicator with the ranks that have the same id; all of them call it, each
 * with its device selected. `nccl` is copied. Fails with TP_PEER when NCCL does, or
 * when a rank does not come in time, or within a minute; then nothing is made. */
int tp_comm_make(tp_comm **made, const tp_nccl *nccl, const tp_nccl_id *id,
                 const tp_comm_place *place, tp_error *err);

/* Wait for what was started, and for `stream` unless it is NULL. `what` says in an
 * error what is waited for: "sending to rank 2". */
int tp_comm_wait(tp_comm *comm, const tp_stream *stream, const char *what,
                 tp_error *err);

/* Abort, and say that `result` is why. Always returns -1. */
int tp_comm_fail(tp_comm *comm, int result, const char *what, tp_error *err);

/* Fails when the communicator has failed before. */
int tp_comm_check(const tp_comm *comm, tp_error *err);

const tp_nccl_functions *tp_comm_calls(const tp_comm *comm); /* borrowed */
void *tp_comm_handle(const tp_comm *comm);                   /* borrowed */
tp_comm_place tp_comm_place_of(const tp_comm *comm);

/* Release it, waiting a few seconds for the other ranks to do so. NULL is fine. */
void tp_comm_close(tp_comm *comm);

#endif
