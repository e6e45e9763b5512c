/* SPDX-License-Identifier: Apache-2.0 */
/* What NCCL is told and asked, with functions in its place that write that down. */
#include "nccl/exchange.h"

#include <stdarg.h>
#include <stdint.h>

#include "check.h"

enum { INTERNAL = 3, FOREVER = 1 << 30 };

static struct {
    char log[400];
    int busy;     /* how often it is in progress once a group has ended */
    int left;     /* of these */
    int running;  /* how often the stream is not done after that */
    int broken;   /* a CUDA error of the stream */
    int send;     /* what a send returns */
    int init;     /* what making a communicator returns */
    int finalize; /* what its end returns */
    int error;    /* the state that is told after `busy` */
} nccl;

static char memory[100];

__attribute__((format(printf, 1, 2))) static void
note(const char *format, ...)
{
    const size_t at = strlen(nccl.log);
    va_list values;

    va_start(values, format);
    vsnprintf(nccl.log + at, sizeof(nccl.log) - at, format, values);
    va_end(values);
}

static int
init(void **comm, int ranks, tp_nccl_id id, int rank, tp_nccl_config *config)
{
    note("init %d/%d %c %d;", rank, ranks, id.bytes[127], config->blocking);
    if (nccl.init != TP_NCCL_SUCCESS)
        return nccl.init;
    *comm = &nccl;
    return TP_NCCL_IN_PROGRESS;
}

static int
async_error(void *comm, int *result)
{
    (void)comm;
    *result = nccl.left > 0 ? TP_NCCL_IN_PROGRESS : nccl.error;
    nccl.left -= nccl.left > 0;
    return TP_NCCL_SUCCESS;
}

static int
abort_it(void *comm)
{
    (void)comm;
    note("abort;");
    return TP_NCCL_SUCCESS;
}

static int
finalize(void *comm)
{
    (void)comm;
    note("finalize;");
    return nccl.finalize;
}

static int
destroy(void *comm)
{
    (void)comm;
    note("destroy;");
    return TP_NCCL_SUCCESS;
}

static int
group_start(void)
{
    note("(");
    return TP_NCCL_SUCCESS;
}

static int
group_end(void)
{
    note(")");
    nccl.left = nccl.busy;
    return TP_NCCL_IN_PROGRESS;
}

static int
send_to(const void *at, size_t count, int type, int peer, void *comm, void *stream)
{
    note(" to %d %d+%d", peer, (int)((const char *)at - memory), (int)count);
    return type == TP_NCCL_BYTE && comm == &nccl && stream == memory ? nccl.send : 99;
}

static int
receive(void *at, size_t count, int type, int peer, void *comm, void *stream)
{
    note(" from %d %d+%d", peer, (int)((char *)at - memory), (int)count);
    return type == TP_NCCL_BYTE && comm == &nccl && stream == memory ? TP_NCCL_SUCCESS
                                                                     : 99;
}

static const char *
error_text(int result)
{
    return result == INTERNAL ? "internal error" : "another error";
}

static const char *
last_error(void *comm)
{
    (void)comm;
    return nccl.error == TP_NCCL_SUCCESS ? "" : "in detail";
}

/* Notes when it is asked while NCCL still starts. */
static int
stream_done(void *stream)
{
    (void)stream;
    if (nccl.left > 0)
        note(" too early");
    if (nccl.broken != 0)
        return -nccl.broken;
    note(nccl.running > 0 ? "." : "!");
    return nccl.running-- <= 0;
}

static tp_comm *
make(double seconds, tp_error *err)
{
    static const tp_nccl table = {.calls = {.get_version = NULL,
                                            .init = init,
                                            .async_error = async_error,
                                            .abort = abort_it,
                                            .finalize = finalize,
                                            .destroy = destroy,
                                            .group_start = group_start,
                                            .group_end = group_end,
                                            .send = send_to,
                                            .receive = receive,
                                            .error_text = error_text,
                                            .last_error = last_error}};
    const tp_comm_place place = {.rank = 1, .ranks = 4, .seconds = seconds};
    tp_nccl_id id = {.bytes = ""};
    tp_comm *comm = NULL;

    id.bytes[TP_NCCL_ID_BYTES - 1] = 'x';
    if (tp_comm_make(&comm, &table, &id, &place, err) < 0)
        return NULL;
    nccl.log[0] = '\0';
    return comm;
}

static tp_comm *
fresh(double seconds)
{
    tp_error err = TP_NO_ERROR;

    memset(&nccl, 0, sizeof(nccl));
    tp_comm *comm = make(seconds, &err);
    CHECK(comm != NULL);
    return comm;
}

static int
run(tp_comm *comm, const tp_transfer *transfers, int64_t count, tp_error *err)
{
    const tp_exchange exchange = {"scatter", transfers, count, {memory, stream_done}};
    return tp_exchange_run(comm, &exchange, err);
}

static const tp_transfer one = {.peer = 2, .sends = true, .at = memory, .bytes = 4};

static void
test_all_transfers_that_are_not_empty_go_at_once(void)
{
    const tp_transfer transfers[] = {{0, true, memory, 25},
                                     {2, false, memory + 40, 10},
                                     {3, true, memory + 30, 0},
                                     {0, false, memory + 60, 11}};
    tp_error err = TP_NO_ERROR;
    tp_comm *comm = fresh(10);

    CHECK_OK(run(comm, transfers, 4, &err), &err);
    CHECK_TEXT_EQ(nccl.log, "( to 0 0+25 from 2 40+10 from 0 60+11)!");
    nccl.log[0] = '\0';
    CHECK_OK(run(comm, transfers + 2, 1, &err), &err);
    CHECK_OK(run(comm, NULL, 0, &err), &err);
    CHECK_TEXT_EQ(nccl.log, "()!()!");
    tp_comm_close(comm);
}

static void
test_the_stream_is_waited_for_once_nccl_has_started(void)
{
    tp_error err = TP_NO_ERROR;
    tp_comm *comm = fresh(10);

    nccl.busy = 3;
    nccl.running = 2;
    CHECK_OK(run(comm, &one, 1, &err), &err);
    CHECK_TEXT_EQ(nccl.log, "( to 2 0+4)..!");
    tp_comm_close(comm);
}

static void
check_it_is_aborted(tp_comm *comm, const char *message, const char *log)
{
    tp_error err = TP_NO_ERROR;

    const int result = run(comm, &one, 1, &err); /* the first failure ends it */
    CHECK_FAILS(result, TP_PEER, &err, message);
    CHECK_TEXT_EQ(nccl.log, log);
    CHECK_FAILS(
        run(comm, &one, 1, &err), TP_PEER, &err,
        "rank 1 of 4: a call of this communicator has failed before; restart all its "
        "ranks");
    tp_comm_close(comm);
    CHECK_TEXT_EQ(nccl.log, log);
}

static void
test_a_stream_that_fails_is_an_error(void)
{
    tp_comm *comm = fresh(10);

    nccl.broken = 700;
    check_it_is_aborted(comm,
                        "rank 1 of 4: scatter: sending to rank 2: its stream has "
                        "failed (CUDA error 700)",
                        "( to 2 0+4)abort;");
}

static void
test_a_group_ends_also_when_a_send_fails(void)
{
    tp_comm *comm = fresh(10);

    nccl.send = INTERNAL;
    check_it_is_aborted(comm,
                        "rank 1 of 4: scatter: sending to rank 2: NCCL says "
                        "\"internal error\"",
                        "( to 2 0+4)abort;");
}

static void
test_an_error_while_it_runs_comes_with_the_last_error(void)
{
    tp_comm *comm = fresh(10);

    nccl.busy = 1;
    nccl.error = INTERNAL;
    check_it_is_aborted(comm,
                        "rank 1 of 4: scatter: sending to rank 2: NCCL says "
                        "\"internal error\": in detail",
                        "( to 2 0+4)abort;");
}

static void
test_the_timeout_holds_for_nccl_and_for_the_stream(void)
{
    static const char message[] =
        "rank 1 of 4: scatter: sending to rank 2 is not done after 0.01 seconds, the "
        "timeout; a rank has ended, joins later than that, or has other sizes";
    tp_comm *comm = fresh(0.01);

    nccl.busy = FOREVER;
    check_it_is_aborted(comm, message, "( to 2 0+4)abort;");

    tp_error err = TP_NO_ERROR;
    comm = fresh(0.01);
    nccl.running = FOREVER;
    const int result = run(comm, &one, 1, &err); /* the first failure ends it */
    CHECK_FAILS(result, TP_PEER, &err, message);
    CHECK(strstr(nccl.log, ".") != NULL);
    tp_comm_close(comm);
    tp_error_clear(&err);
}

static void
test_what_is_done_after_the_timeout_still_counts(void)
{
    tp_error err = TP_NO_ERROR;
    tp_comm *comm = fresh(0);

    CHECK_OK(run(comm, &one, 1, &err), &err);
    tp_comm_close(comm);
}

static void
test_transfers_that_cannot_be_are_refused_before_anything_moves(void)
{
    static const struct {
        tp_transfer transfer;
        const char *message;
    } wrong[] = {
        {{1, true, memory, 4},
         "rank 1 of 4 has a transfer for rank 1; expected another rank of the group"},
        {{4, true, memory, 4},
         "rank 1 of 4 has a transfer for rank 4; expected another rank of the group"},
        {{-1, false, memory, 4},
         "rank 1 of 4 has a transfer for rank -1; expected another rank of the group"},
        {{2, false, memory, -4}, "a transfer of -4 bytes; expected 0 or more"},
    };
    tp_error err = TP_NO_ERROR;
    tp_comm *comm = fresh(10);

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        const tp_transfer transfers[] = {one, wrong[i].transfer};
        CHECK_FAILS(run(comm, transfers, 2, &err), TP_VALUE, &err, wrong[i].message);
    }
    CHECK_TEXT_EQ(nccl.log, "");
    CHECK_OK(run(comm, &one, 1, &err), &err);
    tp_comm_close(comm);
    tp_error_clear(&err);
}

static void
test_a_communicator_that_is_not_made_leaves_nothing(void)
{
    tp_error err = TP_NO_ERROR;

    memset(&nccl, 0, sizeof(nccl));
    nccl.init = INTERNAL;
    CHECK(make(10, &err) == NULL);
    CHECK_TEXT_EQ(tp_error_text(&err),
                  "rank 1 of 4: making a communicator with the other ranks: NCCL says "
                  "\"internal error\"");
    CHECK_TEXT_EQ(nccl.log, "init 1/4 x 0;");
    memset(&nccl, 0, sizeof(nccl));
    nccl.left = FOREVER;
    CHECK(make(0.01, &err) == NULL);
    CHECK_TEXT_EQ(nccl.log, "init 1/4 x 0;abort;");
    tp_error_clear(&err);
}

static void
test_it_is_destroyed_once_finalized_and_else_aborted(void)
{
    tp_comm *comm = fresh(10);

    nccl.left = 2;
    nccl.finalize = TP_NCCL_IN_PROGRESS;
    tp_comm_close(comm);
    CHECK_TEXT_EQ(nccl.log, "finalize;destroy;");

    comm = fresh(10);
    nccl.finalize = INTERNAL;
    tp_comm_close(comm);
    CHECK_TEXT_EQ(nccl.log, "finalize;abort;");
    tp_comm_close(NULL);
}

static void
test_versions_are_written_as_nccl_counts_them(void)
{
    char text[TP_NCCL_VERSION_SIZE];

    tp_nccl_version_write(2804, text);
    CHECK_TEXT_EQ(text, "2.8.4");
    tp_nccl_version_write(20906, text);
    CHECK_TEXT_EQ(text, "2.9.6");
    tp_nccl_version_write(22703, text);
    CHECK_TEXT_EQ(text, "2.27.3");
}

int
main(void)
{
    RUN(test_all_transfers_that_are_not_empty_go_at_once);
    RUN(test_the_stream_is_waited_for_once_nccl_has_started);
    RUN(test_a_stream_that_fails_is_an_error);
    RUN(test_a_group_ends_also_when_a_send_fails);
    RUN(test_an_error_while_it_runs_comes_with_the_last_error);
    RUN(test_the_timeout_holds_for_nccl_and_for_the_stream);
    RUN(test_what_is_done_after_the_timeout_still_counts);
    RUN(test_transfers_that_cannot_be_are_refused_before_anything_moves);
    RUN(test_a_communicator_that_is_not_made_leaves_nothing);
    RUN(test_it_is_destroyed_once_finalized_and_else_aborted);
    RUN(test_versions_are_written_as_nccl_counts_them);
    return check_result();
}
