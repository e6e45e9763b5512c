/* SPDX-License-Identifier: Apache-2.0 */
/* exchange.c -- rounds of one piece of each parcel.
 *
 * A round is one group of NCCL's, so its sends and receives run together and no order
 * of the ranks can lock them up. Pieces are alike on both sides, so rounds match, too;
 * a rank that has less to move stops earlier. */
#include "exchange.h"

#include <stdio.h>

static int
check_parcels(const tp_comm *comm, const tp_exchange *exchange, tp_error *err)
{
    const tp_comm_place place = tp_comm_place_of(comm);

    if (exchange->piece <= 0)
        return tp_fail(err, TP_VALUE, "a piece of %lld bytes; expected 1 or more",
                       (long long)exchange->piece);
    for (int64_t i = 0; i < exchange->count; i++) {
        const tp_parcel *parcel = &exchange->parcels[i];
        if (parcel->peer < 0 || parcel->peer >= place.ranks ||
            parcel->peer == place.rank)
            return tp_fail(err, TP_VALUE,
                           "rank %d of %d has a parcel for rank %d; expected another "
                           "rank of the group",
                           place.rank, place.ranks, parcel->peer);
        if (parcel->bytes < 0)
            return tp_fail(err, TP_VALUE, "a parcel of %lld bytes",
                           (long long)parcel->bytes);
    }
    return 0;
}

static int64_t
longest_of(const tp_exchange *exchange)
{
    int64_t longest = 0;

    for (int64_t i = 0; i < exchange->count; i++)
        if (exchange->parcels[i].bytes > longest)
            longest = exchange->parcels[i].bytes;
    return longest;
}

/* Write what a round moves: "scatter: sending to rank 1, rank 2". Cut where it is long.
 */
static void
describe(const tp_exchange *exchange, int64_t from, char *text, size_t size)
{
    size_t at = (size_t)snprintf(text, size, "%s", exchange->what);
    const char *before = ":";

    for (int64_t i = 0; i < exchange->count && at < size; i++) {
        const tp_parcel *parcel = &exchange->parcels[i];
        if (parcel->bytes <= from)
            continue;
        at += (size_t)snprintf(text + at, size - at, "%s %s rank %d", before,
                               parcel->sends ? "sending to" : "receiving from",
                               parcel->peer);
        before = ",";
    }
}

/* Hand over the next piece of each parcel that has one. */
static int
start_pieces(const tp_comm *comm, const tp_exchange *exchange, int64_t from)
{
    const tp_nccl_functions *calls = tp_comm_calls(comm);
    void *handle = tp_comm_handle(comm);

    for (int64_t i = 0; i < exchange->count; i++) {
        const tp_parcel *parcel = &exchange->parcels[i];
        if (parcel->bytes <= from)
            continue;
        const int64_t rest = parcel->bytes - from;
        const size_t bytes = (size_t)(rest < exchange->piece ? rest : exchange->piece);
        char *at = (char *)parcel->at + from;
        void *stream = exchange->stream.at;
        const int result =
            parcel->sends
                ? calls->send(at, bytes, TP_NCCL_BYTE, parcel->peer, handle, stream)
                : calls->receive(at, bytes, TP_NCCL_BYTE, parcel->peer, handle, stream);
        if (result != TP_NCCL_SUCCESS && result != TP_NCCL_IN_PROGRESS)
            return result;
    }
    return TP_NCCL_SUCCESS;
}

static int
run_round(tp_comm *comm, const tp_exchange *exchange, int64_t from, tp_error *err)
{
    const tp_nccl_functions *calls = tp_comm_calls(comm);
    char what[256];

    describe(exchange, from, what, sizeof(what));
    int result = calls->group_start();
    if (result != TP_NCCL_SUCCESS)
        return tp_comm_give_up(comm, result, what, err);
    const int started = start_pieces(comm, exchange, from);
    /* Ended also after a failure: a group that stays open takes in all later calls. */
    const int ended = calls->group_end();
    result = started != TP_NCCL_SUCCESS ? started : ended;
    if (result != TP_NCCL_SUCCESS && result != TP_NCCL_IN_PROGRESS)
        return tp_comm_give_up(comm, result, what, err);
    return tp_comm_wait(comm, &exchange->stream, what, err);
}

int
tp_exchange_run(tp_comm *comm, const tp_exchange *exchange, tp_error *err)
{
    if (tp_comm_check(comm, err) < 0 || check_parcels(comm, exchange, err) < 0)
        return -1;
    int64_t rest = longest_of(exchange);
    for (int64_t from = 0; rest > 0; from += exchange->piece, rest -= exchange->piece)
        if (run_round(comm, exchange, from, err) < 0)
            return -1;
    return 0;
}
