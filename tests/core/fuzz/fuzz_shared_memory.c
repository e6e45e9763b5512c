/* SPDX-License-Identifier: Apache-2.0 */
/* Collectives in shared memory while a peer writes garbage into it.
 *
 * This process is rank 0, and also writes what another would. Every call comes to an
 * end, and its result is in memory of just the size that it may write. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */

#include <time.h>
#include <unistd.h>

#include "input.h"
#include "shared_memory/collectives.h"
#include "shared_memory/shm_layout.h"

enum { SLOT = 64, MOST_BYTES = 1024, MOST_STEPS = 12 };

static const double kPatience = 0.001;
/* A call waits for each peer and each chunk; a machine may be busy. */
static const double kLongest = 30;

static tp_shm *
open_memory(int ranks)
{
    static int opened;
    char name[64];
    tp_error err = TP_NO_ERROR;
    tp_shm *shm = NULL;
    snprintf(name, sizeof(name), "/autotp-fuzz-%ld-%d", (long)getpid(), opened++);
    REQUIRE(tp_shm_open(&shm, name, 0, ranks, SLOT, &err) == 0);
    tp_shm_unlink(name);
    return shm;
}

/* What a rank that does as it should has written when it has posted a message. */
static void
post_as(tp_shm *shm, int rank, const tp_collective_message *message)
{
    tp_shm_counters *own = &shm->counters[rank];
    const uint64_t chunk = own->posted;
    own->tags[chunk % TP_SHM_SLOTS] =
        (tp_shm_tag){message->bytes, message->kind, shm->label};
    own->joined = 1;
    own->posted = chunk + 1;
    own->read = chunk + 1;
}

/* Any byte of the memory, or a counter, becomes another. */
static void
write_garbage(input *in, tp_shm *shm)
{
    const int rank = take_int(in, 0, shm->ranks - 1);
    tp_shm_counters *counters = &shm->counters[rank];
    switch (take_int(in, 0, 6)) {
        case 0:
            counters->posted = (uint64_t)take_size(in);
            break;
        case 1:
            counters->read = (uint64_t)take_size(in);
            break;
        case 2:
            counters->joined = (uint64_t)take_size(in);
            break;
        case 3:
            counters->failed = (uint64_t)take_size(in);
            break;
        case 4: {
            tp_shm_tag *tag = &counters->tags[take_int(in, 0, 1)];
            tag->bytes = (uint64_t)take_size(in);
            tag->kind = (uint64_t)take_size(in);
            tag->label = (uint64_t)take_size(in);
            break;
        }
        default: {
            const size_t at = (size_t)take_short(in);
            ((unsigned char *)shm->counters)[at % shm->bytes] =
                (unsigned char)take_byte(in);
        }
    }
}

static double
now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

static void
collect(input *in, tp_shm *shm, const tp_collective_message *message)
{
    tp_error err = TP_NO_ERROR;
    const bool all = message->kind == TP_GATHER;
    const size_t room = all ? message->bytes * (size_t)shm->ranks : message->bytes;
    char *to = malloc(room + 1);
    REQUIRE(to != NULL);
    const size_t item = message->kind == TP_SUM_F64   ? 8
                        : message->kind == TP_SUM_F32 ? 4
                                                      : 2;
    const size_t items = message->bytes / item;
    const size_t first = items > 0 ? (size_t)take_byte(in) % items : 0;
    const int result = all ? tp_collective_gather(shm, message, to, kPatience, &err)
                           : tp_collective_sum(shm, message, first, items - first, to,
                                               kPatience, &err);
    REQUIRE(result == 0 || err.code == TP_PEER);
    is_done(result, &err);
    free(to);
}

static void
step(input *in, tp_shm *shm)
{
    const tp_collective kind = (tp_collective)take_int(in, 0, TP_GATHER);
    const size_t bytes = ((size_t)take_byte(in) * 8) % (MOST_BYTES + 1);
    char *from = calloc(1, bytes + 1);
    REQUIRE(from != NULL);
    const tp_collective_message message = {from, bytes, kind, false};
    tp_error err = TP_NO_ERROR;
    const double began = now();
    switch (take_int(in, 0, 3)) {
        case 0:
            for (int rank = 1; rank < shm->ranks; rank++)
                post_as(shm, rank, &message);
            break;
        case 1:
            is_done(tp_collective_post(shm, &message, kPatience, &err), &err);
            break;
        case 2:
            collect(in, shm, &message);
            break;
        default:
            write_garbage(in, shm);
    }
    REQUIRE(now() - began < kLongest);
    free(from);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = input_of(data, size);
    tp_shm *shm = open_memory(take_int(&in, 2, 4));
    for (int steps = 0; in.left > 0 && steps < MOST_STEPS; steps++)
        step(&in, shm);
    tp_shm_close(shm);
    input_end(&in);
    return 0;
}
