/* SPDX-License-Identifier: Apache-2.0 */
/* exchange.c -- one group of NCCL's, so that its sends and receives run together and no
 * order of the ranks can lock them up. */
#include "nccl/exchange.h"

#include <stdio.h>

static int
check_transfers(const tp_comm *comm, const tp_exchange *exchange, tp_error *err)
{
    const tp_comm_place place = tp_comm_place_of(comm);

    for (int64_t i = 0; i < exchange->count; i++) {
        const tp_transfer *transfer = &exchange->transfers[i];
        if (transfer->peer < 0 || transfer->peer >= place.ranks ||
            transfer->peer == place.rank)
            return tp_fail(err, TP_VALUE,
                           "rank %d of %d has a transfer for rank %d; expected another "
                           "rank of the group",
                           place.rank, place.ranks, transfer->peer);
        if (transfer->bytes < 0)
            return tp_fail(err, TP_VALUE,
                           "a transfer of %lld bytes; expected 0 or more",
                           (long long)transfer->bytes);
    }
    return 0;
}

/* Write what is moved: "scatter: sending to rank 1, rank 2". Truncated where it is
 * long. */
static void
describe(const tp_exchange *exchange, char *text, size_t size)
{
    size_t at = (size_t)snprintf(text, size, "%s", exchange->what);
    const char *before = ":";

    for (int64_t i = 0; i < exchange->count && at < size; i++) {
        const tp_transfer *transfer = &exchange->transfers[i];
        if (transfer->bytes == 0)
            continue;
        at += (size_t)snprintf(text + at, size - at, "%s %s rank %d", before,
                               transfer->sends ? "sending to" : "receiving from",
                               transfer->peer);
        before = ",";
    }
}

/* Start the transfers that are not empty. */
static int
start(const tp_comm *comm, const tp_exchange *exchange)
{
    const tp_nccl_functions *calls = tp_comm_calls(comm);
    void *handle = tp_comm_handle(comm);
    void *stream = exchange->stream.at;

    for (int64_t i = 0; i < exchange->count; i++) {
        const tp_transfer *transfer = &exchange->transfers[i];
        const size_t bytes = (size_t)transfer->bytes;
        if (bytes == 0)
            continue;
        const int result = transfer->sends
                               ? calls->send(transfer->at, bytes, TP_NCCL_BYTE,
                                             transfer->peer, handle, stream)
                               : calls->receive(transfer->at, bytes, TP_NCCL_BYTE,
                                                transfer->peer, handle, stream);
        if (result != TP_NCCL_SUCCESS && result != TP_NCCL_IN_PROGRESS)
            return result;
    }
    return TP_NCCL_SUCCESS;
}

int
tp_exchange_run(tp_comm *comm, const tp_exchange *exchange, tp_error *err)
{
    char what[256];

    if (tp_comm_check(comm, err) < 0 || check_transfers(comm, exchange, err) < 0)
        return -1;
    describe(exchange, what, sizeof(what));
    const tp_nccl_functions *calls = tp_comm_calls(comm);
    int result = calls->group_start();
    if (result != TP_NCCL_SUCCESS)
        return tp_comm_fail(comm, result, what, err);
    const int started = start(comm, exchange);
    /* Ended also after a failure: a group that stays open gets all later calls. */
    const int ended = calls->group_end();
    result = started != TP_NCCL_SUCCESS ? started : ended;
    if (result != TP_NCCL_SUCCESS && result != TP_NCCL_IN_PROGRESS)
        return tp_comm_fail(comm, result, what, err);
    return tp_comm_wait(comm, &exchange->stream, what, err);
}
