/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L

#include <signal.h>
#include <sys/stat.h>
#include <time.h>

#include "shm_ranks.h"

static int
fails_with(tp_shm *shm, const tp_collective_message *message, float *x,
           const char *words)
{
    const size_t count = message->bytes / sizeof(float);
    tp_error err = TP_NO_ERROR;

    if (tp_collective_sum(shm, message, 0, count, x, PATIENCE, &err) == 0)
        return 11;
    const bool right =
        err.code == TP_PEER && strstr(tp_error_text(&err), words) != NULL;
    if (!right)
        fprintf(stderr, "%s\n", tp_error_text(&err));
    tp_error_clear(&err);
    if (!right)
        return 12;
    if (tp_collective_post(shm, message, PATIENCE, &err) == 0 &&
        tp_collective_sum(shm, message, 0, count, x, PATIENCE, &err) == 0)
        return 13;
    const bool broken = strstr(tp_error_text(&err), "has failed before") != NULL;
    tp_error_clear(&err);
    return broken ? 0 : 14;
}

/* The last rank dies, in the middle of a message, after one that is complete. Of the
 * others only the first waits: that the second lives must not keep it waiting. */
static int
lose_a_rank(tp_shm *shm, int rank, int ranks)
{
    static float x[MOST];
    const tp_collective_message message = {x, sizeof(x), TP_SUM_F32, false};
    const struct timespec pause = {1, 0};
    tp_error err = TP_NO_ERROR;
    char words[64];

    if (tp_collective_post(shm, &message, PATIENCE, &err) < 0 ||
        tp_collective_sum(shm, &message, 0, MOST, x, PATIENCE, &err) < 0)
        return 1;
    if (rank == ranks - 1)
        _exit(0);
    if (rank > 0)
        return nanosleep(&pause, NULL);
    if (tp_collective_post(shm, &message, PATIENCE, &err) < 0)
        return 2;
    snprintf(words, sizeof(words), "rank %d of the group has ended while rank 0",
             ranks - 1);
    return fails_with(shm, &message, x, words);
}

static void
test_a_rank_that_ends_is_an_error_on_the_others(void)
{
    CHECK_INT_EQ(run_ranks(2, lose_a_rank), 0);
    CHECK_INT_EQ(run_ranks(3, lose_a_rank), 0);
}

/* Rank 1 gives more than the others. */
static int
give_more(tp_shm *shm, int rank, int ranks)
{
    static float x[MOST];
    const tp_collective_message message = {x, (rank == 1 ? 20 : 10) * sizeof(float),
                                           TP_SUM_F32, false};
    tp_error err = TP_NO_ERROR;

    (void)ranks;
    if (tp_collective_post(shm, &message, PATIENCE, &err) < 0)
        return 1;
    return fails_with(
        shm, &message, x,
        rank == 0 ? "collective mismatch: rank 0 gives 40 bytes to be summed as "
                    "float32, rank 1 gives 80 to be summed as float32; all "
                    "ranks of a TP group need the same batch"
                  : "collective mismatch: rank 1 gives 80 bytes");
}

/* Rank 1 gives nothing, and rank 0 gathers what the other sums. */
static int
do_something_else(tp_shm *shm, int rank, int ranks)
{
    static float x[4];
    const tp_collective_message message = {x, rank == 1 ? 0 : sizeof(x),
                                           rank == 0 ? TP_GATHER : TP_SUM_F32, false};
    tp_error err = TP_NO_ERROR;

    (void)ranks;
    if (tp_collective_post(shm, &message, PATIENCE, &err) < 0)
        return 1;
    return fails_with(shm, &message, x, "all ranks of a TP group need the same batch");
}

static void
test_messages_that_differ_are_an_error_on_every_rank(void)
{
    CHECK_INT_EQ(run_ranks(2, give_more), 0);
    CHECK_INT_EQ(run_ranks(2, do_something_else), 0);
}

/* Rank 1 has left out call 4 of the model. */
static int
leave_out_a_call(tp_shm *shm, int rank, int ranks)
{
    float x[4] = {0};
    const tp_collective_message message = {x, sizeof(x), TP_SUM_F32, false};
    tp_error err = TP_NO_ERROR;

    (void)ranks;
    tp_shm_set_call(shm, rank == 1 ? 5 : 4, 7);
    if (tp_collective_post(shm, &message, PATIENCE, &err) < 0)
        return 1;
    return fails_with(shm, &message, x,
                      rank == 1
                          ? "rank 1 is at call 5 of the model, rank 0 at call 4; all"
                          : "rank 0 is at call 4 of the model, rank 1 at call 5; all");
}

/* Rank 0 is in the backward pass already, with messages longer than the slots. */
static int
repeat_a_forward(tp_shm *shm, int rank, int ranks)
{
    static float x[MOST];
    const tp_collective_message message = {x, sizeof(x), TP_SUM_F32, rank == 0};
    tp_error err = TP_NO_ERROR;

    (void)ranks;
    tp_shm_set_call(shm, (1 << 24) + 3, 7); /* the number has come around */
    if (tp_collective_post(shm, &message, PATIENCE, &err) < 0)
        return 1;
    return fails_with(shm, &message, x,
                      rank == 1
                          ? "rank 1 is at call 3 of the model, rank 0 in the backward "
                            "of call 3; all"
                          : "rank 0 is in the backward of call 3 of the model, rank 1 "
                            "at call 3; all");
}

/* Rank 1 has another batch. */
static int
differ_in_the_batch(tp_shm *shm, int rank, int ranks)
{
    float x[4] = {0};
    const tp_collective_message message = {x, sizeof(x), TP_SUM_F32, true};
    tp_error err = TP_NO_ERROR;

    (void)ranks;
    tp_shm_set_call(shm, 2, rank == 1 ? 8 : 7);
    if (tp_collective_post(shm, &message, PATIENCE, &err) < 0)
        return 1;
    return fails_with(shm, &message, x,
                      "were given different batches in call 2 of the");
}

static void
test_messages_of_different_calls_are_an_error_on_every_rank(void)
{
    CHECK_INT_EQ(run_ranks(2, leave_out_a_call), 0);
    CHECK_INT_EQ(run_ranks(2, repeat_a_forward), 0);
    CHECK_INT_EQ(run_ranks(2, differ_in_the_batch), 0);
}

/* A fork of rank 0 is refused, and the ranks sum as ever. */
static int
sum_in_a_fork(tp_shm *shm, int rank, int ranks)
{
    float x[3] = {1, 2, 3};
    const tp_collective_message message = {x, sizeof(x), TP_SUM_F32, false};
    tp_error err = TP_NO_ERROR;
    int status = 0;

    (void)ranks;
    if (rank == 0) {
        const pid_t child = fork();
        if (child == 0) {
            const bool refused =
                tp_collective_post(shm, &message, PATIENCE, &err) < 0 &&
                strstr(tp_error_text(&err), "which is rank 0 of the group") != NULL;
            tp_error_clear(&err);
            tp_shm_close(shm);
            _exit(refused ? 0 : 1);
        }
        waitpid(child, &status, 0);
    }
    if (status != 0 || tp_collective_post(shm, &message, PATIENCE, &err) < 0 ||
        tp_collective_sum(shm, &message, 0, 3, x, PATIENCE, &err) < 0)
        return 1;
    return x[0] == 2 && x[1] == 4 && x[2] == 6 ? 0 : 2;
}

static void
test_a_fork_of_a_rank_is_refused_and_changes_nothing(void)
{
    CHECK_INT_EQ(run_ranks(2, sum_in_a_fork), 0);
}

/* The second rank comes too late. */
static int
lose_patience(tp_shm *shm, int rank, int ranks)
{
    float x[3] = {0};
    const tp_collective_message message = {x, sizeof(x), TP_SUM_F32, false};
    const struct timespec pause = {2, 0};
    tp_error err = TP_NO_ERROR;

    (void)ranks;
    if (rank == 1)
        return nanosleep(&pause, NULL);
    if (tp_collective_post(shm, &message, 0.05, &err) < 0)
        return 1;
    if (tp_collective_sum(shm, &message, 0, 3, x, 0.05, &err) == 0)
        return 2;
    const bool said = strstr(tp_error_text(&err),
                             "shared memory: rank 1 of the group has not joined the "
                             "collective in which rank 0 has waited for it for 0.05 "
                             "seconds") != NULL;
    tp_error_clear(&err);
    return said ? 0 : 3;
}

static void
test_a_rank_that_does_not_come_is_an_error(void)
{
    CHECK_INT_EQ(run_ranks(2, lose_patience), 0);
}

static void
test_memory_that_is_not_there_and_a_name_that_is_taken_are_errors(void)
{
    char name[64];
    tp_error err = TP_NO_ERROR;
    tp_shm *shm = NULL;
    tp_shm *other = NULL;

    name_of_run(name, sizeof(name));
    CHECK_INT_EQ(tp_shm_open(&shm, name, 1, 2, SLOT, &err), -1);
    CHECK_TEXT_EQ(tp_error_text(&err),
                  "shared memory cannot be opened: No such file or directory");
    tp_error_clear(&err);
    if (!CHECK_OK(tp_shm_open(&shm, name, 0, 2, SLOT, &err), &err))
        return;
    CHECK_INT_EQ(tp_shm_open(&other, name, 0, 2, SLOT, &err), -1);
    CHECK_TEXT_EQ(tp_error_text(&err), "shared memory cannot be opened: File exists");
    tp_error_clear(&err);
    tp_shm_close(shm);
    tp_shm_unlink(name);
    /* More than any machine has is refused while it can be, and its name is gone. */
    CHECK_INT_EQ(tp_shm_open(&shm, name, 0, 2, (size_t)1 << 45, &err), -1);
    CHECK(strstr(tp_error_text(&err), "cannot be reserved") != NULL);
    tp_error_clear(&err);
    CHECK_INT_EQ(tp_shm_open(&shm, name, 1, 2, SLOT, &err), -1);
    tp_error_clear(&err);
}

static void
test_memory_that_another_user_can_write_is_refused(void)
{
    char name[64], file[80];
    tp_error err = TP_NO_ERROR;
    tp_shm *shm = NULL;
    tp_shm *other = NULL;

    name_of_run(name, sizeof(name));
    snprintf(file, sizeof(file), "/dev/shm%s", name);
    if (!CHECK_OK(tp_shm_open(&shm, name, 0, 2, SLOT, &err), &err))
        return;
    CHECK_INT_EQ(chmod(file, 0660), 0);
    CHECK_FAILS(tp_shm_open(&other, name, 1, 2, SLOT, &err), TP_PEER, &err,
                "open to another user");
    CHECK_INT_EQ(chmod(file, 0600), 0);
    if (geteuid() == 0) { /* other users may not give a file away */
        CHECK_INT_EQ(chown(file, 65534, 65534), 0);
        CHECK_FAILS(tp_shm_open(&other, name, 1, 2, SLOT, &err), TP_PEER, &err,
                    "open to another user");
    }
    tp_shm_close(shm);
    tp_shm_unlink(name);
}

int
main(void)
{
    RUN(test_a_rank_that_ends_is_an_error_on_the_others);
    RUN(test_messages_that_differ_are_an_error_on_every_rank);
    RUN(test_messages_of_different_calls_are_an_error_on_every_rank);
    RUN(test_a_fork_of_a_rank_is_refused_and_changes_nothing);
    RUN(test_a_rank_that_does_not_come_is_an_error);
    RUN(test_memory_that_is_not_there_and_a_name_that_is_taken_are_errors);
    RUN(test_memory_that_another_user_can_write_is_refused);
    return check_result();
}
