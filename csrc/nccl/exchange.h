/* SPDX-License-Identifier: Apache-2.0 */
/* exchange.h -- transfers of bytes between ranks, sent and received at once.
 *
 * Knows no tensors. Between two ranks, transfers are matched by their order, and those
 * that match have the same size on both. */
#ifndef TP_NCCL_EXCHANGE_H
#define TP_NCCL_EXCHANGE_H

#include <stdint.h>

#include "nccl/comm.h"

typedef struct {
    int peer;   /* another rank */
    bool sends; /* else it receives */
    void *at;   /* borrowed; what is sent is only read */
    int64_t bytes;
} tp_transfer;

typedef struct {
    const char *what; /* for errors: "scatter" */
    const tp_transfer *transfers;
    int64_t count;
    tp_stream stream;
} tp_exchange;

/* Move all transfers, and return when the stream is done. Fails with TP_VALUE for a
 * peer or a size that cannot be, before anything is moved; with TP_PEER as tp_comm_wait
 * does. What is received is undefined after a failure. */
int tp_exchange_run(tp_comm *comm, const tp_exchange *exchange, tp_error *err);

#endif
