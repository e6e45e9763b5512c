/* SPDX-License-Identifier: Apache-2.0 */
/* shm_data.h -- how shared memory is laid out; for csrc/host alone.
 *
 * Every rank has two slots, which it alone writes, and two counters. A chunk of a
 * message goes into the slot that its number, modulo two, says: `posted` counts the
 * chunks that a rank has laid out, `taken` those it has read from all the others. A
 * slot is free once every other rank has taken what lies in it, so a rank can be one
 * chunk ahead of the slowest and no lock is needed. */
#ifndef TP_SHM_DATA_H
#define TP_SHM_DATA_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "shm.h"

enum {
    TP_SHM_SLOTS = 2,
    /* Two lines: a processor fetches the neighbour of a line with it. */
    TP_SHM_APART = 128
};

typedef struct {
    _Alignas(TP_SHM_APART) _Atomic uint64_t posted;
    _Atomic uint64_t joined; /* 1 once the rank holds its lock */
    _Alignas(TP_SHM_APART) _Atomic uint64_t taken;
} tp_shm_counters;

struct tp_shm {
    int rank;
    int ranks;
    int file; /* owned; the only descriptor of it, as closing any would drop the lock */
    int looks; /* at a counter before the core is yielded */
    size_t slot;
    size_t bytes;
    tp_shm_counters *counters; /* owned, mapped: those of all ranks, then their slots */
    char *slots;               /* in the same memory */
    bool failed;
};

/* The slot of `rank` for its chunk number `chunk`. */
static inline char *
tp_shm_at(const tp_shm *shm, int rank, uint64_t chunk)
{
    const size_t index = (size_t)rank * TP_SHM_SLOTS + chunk % TP_SHM_SLOTS;
    return shm->slots + index * shm->slot;
}

/* Whether the process of `rank` has joined and ended: the lock that it held on its byte
 * of the file is gone. */
int tp_shm_has_ended(const tp_shm *shm, int rank, bool *ended, tp_error *err);

#endif
