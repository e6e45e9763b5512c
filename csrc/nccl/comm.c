/* SPDX-License-Identifier: Apache-2.0 */
/* comm.c -- a communicator of NCCL's, polled until a deadline. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime, nanosleep */

#include "nccl/comm.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    kSleep = 10000, /* nanoseconds of the first, each twice as long as the one before */
    kLongestSleep = 200000
};

/* Most seconds that making one may take: the ranks have just met. */
static const double kMaking = 60;

/* Seconds that closing may take. Nothing is under way then, so it is short: a rank that
 * ends without closing shall not hold the others up. */
static const double kClosing = 5;

struct tp_comm {
    tp_nccl nccl;
    tp_comm_place place;
    void *handle; /* owned; NULL once it is aborted */
};

static double
now(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

static void
abort_comm(tp_comm *comm)
{
    if (comm->handle != NULL)
        (void)comm->nccl.calls.abort(comm->handle);
    comm->handle = NULL;
}

/* What NCCL says of what failed last, or nothing. */
static const char *
last_error(const tp_comm *comm)
{
    const char *text = comm->nccl.calls.last_error(comm->handle);
    return text == NULL ? "" : text;
}

int
tp_comm_fail(tp_comm *comm, int result, const char *what, tp_error *err)
{
    const char *text = last_error(comm);

    tp_fail(err, TP_PEER, "rank %d of %d: %s: NCCL says \"%s\"%s%s", comm->place.rank,
            comm->place.ranks, what, comm->nccl.calls.error_text(result),
            text[0] == '\0' ? "" : ": ", text);
    abort_comm(comm);
    return -1;
}

static int
fail_timeout(tp_comm *comm, const char *what, tp_error *err)
{
    const char *text = last_error(comm);

    tp_fail(err, TP_PEER,
            "rank %d of %d: %s is not done after %g seconds, the timeout; a rank has "
            "ended, joins later than that, or has other sizes%s%s",
            comm->place.rank, comm->place.ranks, what, comm->place.seconds,
            text[0] == '\0' ? "" : "; NCCL's last error: ", text);
    abort_comm(comm);
    return -1;
}

static int
fail_stream(tp_comm *comm, int error, const char *what, tp_error *err)
{
    tp_fail(err, TP_PEER, "rank %d of %d: %s: its stream has failed (CUDA error %d)",
            comm->place.rank, comm->place.ranks, what, error);
    abort_comm(comm);
    return -1;
}

/* Fill `result` with NCCL's state, TP_NCCL_IN_PROGRESS also while the stream runs. */
static int
poll_state(tp_comm *comm, const tp_stream *stream, const char *what, int *result,
           tp_error *err)
{
    const int asked = comm->nccl.calls.async_error(comm->handle, result);

    if (asked != TP_NCCL_SUCCESS)
        *result = asked;
    /* While NCCL still starts, the stream does not yet have all that it gets. */
    if (*result != TP_NCCL_SUCCESS || stream == NULL)
        return 0;
    const int done = stream->done(stream->at);
    if (done < 0)
        return fail_stream(comm, -done, what, err);
    if (done == 0)
        *result = TP_NCCL_IN_PROGRESS;
    return 0;
}

int
tp_comm_wait(tp_comm *comm, const tp_stream *stream, const char *what, tp_error *err)
{
    const double deadline = now() + comm->place.seconds;
    struct timespec pause = {0, kSleep};

    for (;;) {
        /* Before the poll: what is done when the time is over counts as done. */
        const bool late = now() > deadline;
        int result = TP_NCCL_IN_PROGRESS;
        if (poll_state(comm, stream, what, &result, err) < 0)
            return -1;
        if (result == TP_NCCL_SUCCESS)
            return 0;
        if (result != TP_NCCL_IN_PROGRESS)
            return tp_comm_fail(comm, result, what, err);
        if (late)
            return fail_timeout(comm, what, err);
        nanosleep(&pause, NULL);
        if (pause.tv_nsec < kLongestSleep)
            pause.tv_nsec *= 2;
    }
}

int
tp_comm_make(tp_comm **made, const tp_nccl *nccl, const tp_nccl_id *id,
             const tp_comm_place *place, tp_error *err)
{
    static const char what[] = "making a communicator with the other ranks";
    tp_nccl_config config = {sizeof(config), TP_NCCL_MAGIC, TP_NCCL_OLDEST, 0};
    tp_comm *comm = calloc(1, sizeof(*comm));

    if (comm == NULL)
        return tp_fail_memory(err);
    comm->nccl = *nccl;
    comm->place = *place;
    if (comm->place.seconds > kMaking)
        comm->place.seconds = kMaking;
    const int result =
        nccl->calls.init(&comm->handle, place->ranks, *id, place->rank, &config);
    if (result != TP_NCCL_SUCCESS && result != TP_NCCL_IN_PROGRESS) {
        tp_comm_fail(comm, result, what, err);
        goto failed;
    }
    if (tp_comm_wait(comm, NULL, what, err) < 0)
        goto failed;
    comm->place.seconds = place->seconds;
    *made = comm;
    return 0;

failed:
    free(comm);
    return -1;
}

int
tp_comm_check(const tp_comm *comm, tp_error *err)
{
    if (comm->handle != NULL)
        return 0;
    return tp_fail(err, TP_PEER,
                   "rank %d of %d: a call of this communicator has failed before; "
                   "restart all its ranks",
                   comm->place.rank, comm->place.ranks);
}

const tp_nccl_functions *
tp_comm_calls(const tp_comm *comm)
{
    return &comm->nccl.calls;
}

void *
tp_comm_handle(const tp_comm *comm)
{
    return comm->handle;
}

tp_comm_place
tp_comm_place_of(const tp_comm *comm)
{
    return comm->place;
}

void
tp_comm_close(tp_comm *comm)
{
    tp_error err = TP_NO_ERROR;

    if (comm == NULL)
        return;
    if (comm->handle != NULL) {
        const int result = comm->nccl.calls.finalize(comm->handle);
        comm->place.seconds = kClosing;
        if (result != TP_NCCL_SUCCESS && result != TP_NCCL_IN_PROGRESS)
            abort_comm(comm);
        /* One that is not done is aborted, which releases it as well. */
        else if (tp_comm_wait(comm, NULL, "closing", &err) == 0)
            (void)comm->nccl.calls.destroy(comm->handle);
    }
    tp_error_clear(&err);
    free(comm);
}
