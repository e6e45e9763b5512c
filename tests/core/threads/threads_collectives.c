/* SPDX-License-Identifier: Apache-2.0 */
/* Collectives with a thread for each rank, in one mapping of the memory: what a rank
 * reads of another it has waited for.
 *
 * The locks by which ranks see that another has ended are those of a process, and all
 * ranks are in this one, so that is asked of the test instead. */
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

#include "check.h"
#include "shared_memory/collectives.h"
#include "shared_memory/shm_layout.h"
#include "threads.h"

enum { RANKS = 3, SLOT = 256, MOST = 1500, ROUNDS = 60 };

static const double kPatience = 60;

int __wrap_tp_shm_has_ended(const tp_shm *shm, int rank, bool *ended, tp_error *err);

static _Atomic int ended_rank = -1;

int
__wrap_tp_shm_has_ended(const tp_shm *shm, int rank, bool *ended, tp_error *err)
{
    (void)shm;
    (void)err;
    *ended = atomic_load(&ended_rank) == rank;
    return 0;
}

static tp_shm *
open_memory(void)
{
    static int opened;
    char name[64];
    tp_error err = TP_NO_ERROR;
    tp_shm *shm = NULL;
    snprintf(name, sizeof(name), "/autotp-threads-%ld-%d", (long)getpid(), opened++);
    CHECK_OK(tp_shm_open(&shm, name, 0, RANKS, SLOT, &err), &err);
    tp_shm_unlink(name);
    return shm;
}

static float
item_of(int rank, size_t i, int round)
{
    return (float)((i * 7 + (size_t)rank * 3 + (size_t)round) % 32) - 10;
}

/* Nothing, less than a slot, a slot, and many. */
static size_t
count_of(int round)
{
    static const size_t counts[] = {0, 5, 64, 65, 128, 129, 700, MOST};
    return counts[(size_t)round % (sizeof(counts) / sizeof(counts[0]))];
}

static int
sum_and_gather(void *shared, int rank)
{
    tp_shm own = *(const tp_shm *)shared;
    tp_error err = TP_NO_ERROR;
    float *x = calloc(MOST, sizeof(*x)), *all = calloc(RANKS * MOST, sizeof(*all));
    int wrong = x == NULL || all == NULL;
    own.rank = rank;
    for (int round = 0; wrong == 0 && round < ROUNDS; round++) {
        const size_t count = count_of(round);
        const tp_collective kind = round % 2 == 0 ? TP_SUM_F32 : TP_GATHER;
        const tp_collective_message message = {x, count * sizeof(*x), kind, false};
        for (size_t i = 0; i < count; i++)
            x[i] = item_of(rank, i, round);
        if (tp_collective_post(&own, &message, kPatience, &err) < 0)
            wrong = 2;
        else if (kind == TP_SUM_F32 &&
                 tp_collective_sum(&own, &message, 0, count, all, kPatience, &err) < 0)
            wrong = 3;
        else if (kind == TP_GATHER &&
                 tp_collective_gather(&own, &message, all, kPatience, &err) < 0)
            wrong = 4;
        for (size_t i = 0; wrong == 0 && i < count; i++) {
            float sum = 0;
            for (int other = 0; other < RANKS; other++) {
                const float item = item_of(other, i, round);
                sum += item;
                if (kind == TP_GATHER && all[(size_t)other * count + i] != item)
                    wrong = 5;
            }
            if (kind == TP_SUM_F32 && all[i] != sum)
                wrong = 6;
        }
    }
    tp_error_clear(&err);
    free(x);
    free(all);
    return wrong;
}

static void
test_ranks_read_what_they_have_waited_for(void)
{
    tp_shm *shm = open_memory();
    CHECK_INT_EQ(run_threads(RANKS, sum_and_gather, shm), 0);
    tp_shm_close(shm);
}

/* 0: the collective fails in words. */
static int
fail_collective(tp_shm *own, size_t bytes, double seconds)
{
    static const float x[4];
    float sum[4];
    tp_error err = TP_NO_ERROR;
    const tp_collective_message message = {x, bytes, TP_SUM_F32, false};
    int wrong = 0;
    if (tp_collective_post(own, &message, seconds, &err) == 0 &&
        tp_collective_sum(own, &message, 0, bytes / sizeof(*x), sum, seconds, &err) ==
            0)
        wrong = 1;
    else if (err.code != TP_PEER)
        wrong = 2;
    tp_error_clear(&err);
    return wrong;
}

static int
give_other_sizes(void *shared, int rank)
{
    tp_shm own = *(const tp_shm *)shared;
    own.rank = rank;
    return fail_collective(&own, rank == 1 ? 8 : 16, kPatience);
}

static void
test_ranks_that_give_other_sizes_all_fail(void)
{
    tp_shm *shm = open_memory();
    CHECK_INT_EQ(run_threads(RANKS, give_other_sizes, shm), 0);
    tp_shm_close(shm);
}

static int
leave_one_out(void *shared, int rank)
{
    tp_shm own = *(const tp_shm *)shared;
    own.rank = rank;
    if (rank == 2) {
        atomic_store(&ended_rank, rank);
        return 0;
    }
    return fail_collective(&own, 16, kPatience);
}

static void
test_a_rank_that_ends_fails_the_others(void)
{
    tp_shm *shm = open_memory();
    CHECK_INT_EQ(run_threads(RANKS, leave_one_out, shm), 0);
    atomic_store(&ended_rank, -1);
    tp_shm_close(shm);
}

static int
wait_in_vain(void *shared, int rank)
{
    tp_shm own = *(const tp_shm *)shared;
    own.rank = rank;
    return rank == 0 ? 0 : fail_collective(&own, 16, 0.05);
}

static void
test_a_rank_that_does_not_come_is_waited_for_no_longer_than_asked(void)
{
    tp_shm *shm = open_memory();
    CHECK_INT_EQ(run_threads(RANKS, wait_in_vain, shm), 0);
    tp_shm_close(shm);
}

int
main(void)
{
    RUN(test_ranks_read_what_they_have_waited_for);
    RUN(test_ranks_that_give_other_sizes_all_fail);
    RUN(test_a_rank_that_ends_fails_the_others);
    RUN(test_a_rank_that_does_not_come_is_waited_for_no_longer_than_asked);
    return check_result();
}
