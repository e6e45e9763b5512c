/* SPDX-License-Identifier: Apache-2.0 */
/* wait.c -- spins, yields and sleeps until a counter is there. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime, nanosleep */

#include "shared_memory/wait.h"

#include <sched.h>
#include <time.h>

enum {
    kSleep = 20000, /* nanoseconds of the first, each twice as long as the one before */
    kLongestSleep = 1000000
};

/* Seconds that are spent yielding before the first sleep. */
static const double kYielding = 0.002;

static bool
is_reached(const _Atomic uint64_t *counter, uint64_t count)
{
    return atomic_load_explicit(counter, memory_order_acquire) >= count;
}

static void
pause_core(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static double
now(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

/* Fails where a rank is gone, awaited or not: the collective cannot be completed. */
static int
check_ranks(const tp_shm *shm, tp_error *err)
{
    for (int rank = 0; rank < shm->ranks; rank++) {
        bool ended = false;
        if (rank == shm->rank)
            continue;
        if (tp_shm_has_ended(shm, rank, &ended, err) < 0)
            return -1;
        if (ended)
            return tp_fail(
                err, TP_PEER,
                "no answer in shared memory: rank %d of the group has ended "
                "while rank %d is in a collective; see the error of that rank",
                rank, shm->rank);
        if (tp_shm_has_failed(shm, rank))
            return tp_fail(
                err, TP_PEER,
                "no answer in shared memory: a collective of the group has "
                "failed on rank %d while rank %d is in one; see the error of "
                "that rank",
                rank, shm->rank);
    }
    return 0;
}

static int
sleep_until(const tp_shm *shm, int rank, const _Atomic uint64_t *counter,
            uint64_t count, double seconds, tp_error *err)
{
    const double deadline = now() + seconds;
    struct timespec pause = {0, kSleep};

    while (!is_reached(counter, count)) {
        if (check_ranks(shm, err) < 0) {
            /* A rank that has ended in order has done all that it had to. */
            if (!is_reached(counter, count))
                return -1;
            tp_error_clear(err);
            return 0;
        }
        if (now() > deadline)
            return tp_fail(
                err, TP_PEER,
                "no answer in shared memory: rank %d of the group has not joined the "
                "collective in which rank %d has waited for it for %g seconds; do all "
                "ranks run the same code?",
                rank, shm->rank, seconds);
        nanosleep(&pause, NULL);
        if (pause.tv_nsec < kLongestSleep)
            pause.tv_nsec *= 2;
    }
    return 0;
}

static int
wait_for(const tp_shm *shm, int rank, const _Atomic uint64_t *counter, uint64_t count,
         double seconds, tp_error *err)
{
    for (int i = 0; i < shm->spins; i++) {
        if (is_reached(counter, count))
            return 0;
        pause_core();
    }
    for (const double began = now(); now() < began + kYielding;) {
        if (is_reached(counter, count))
            return 0;
        sched_yield();
    }
    return sleep_until(shm, rank, counter, count, seconds, err);
}

int
tp_wait(tp_shm *shm, tp_progress what, uint64_t count, double seconds, tp_error *err)
{
    if (tp_shm_check_process(shm, err) < 0)
        return -1;
    if (tp_shm_has_failed(shm, shm->rank))
        return tp_fail(err, TP_PEER,
                       "a collective of this group has failed before; restart all its "
                       "ranks");
    for (int rank = 0; rank < shm->ranks; rank++) {
        const tp_shm_counters *counters = &shm->counters[rank];
        const _Atomic uint64_t *counter =
            what == TP_POSTED ? &counters->posted : &counters->read;
        if (rank != shm->rank && wait_for(shm, rank, counter, count, seconds, err) < 0)
            return tp_shm_fail(shm);
    }
    return 0;
}
