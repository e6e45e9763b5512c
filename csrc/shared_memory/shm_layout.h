/* SPDX-License-Identifier: Apache-2.0 */
/* shm_layout.h -- how shared memory is laid out; for csrc/shared_memory alone.
 *
 * Every rank has two slots, which it alone writes, and two counters. A chunk of a
 * message goes into the slot that its index, modulo two, says: `posted` counts the
 * chunks that a rank has written, `read` those it has read from all the others. A slot
 * is free once every other rank has read what is in it, so a rank can be one chunk
 * ahead of the slowest and no lock is needed. */
#ifndef TP_SHM_LAYOUT_H
#define TP_SHM_LAYOUT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "shared_memory/shm.h"

enum {
    TP_SHM_SLOTS = 2,
    /* Two lines: a processor fetches the neighbour of a line with it. */
    TP_SHM_APART = 128,
    /* Of a label, for the number of a call; above are bits of a digest. */
    TP_SHM_CALL_BITS = 24
};

/* A counter with a lock of its process would count for that process alone. */
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && sizeof(uint64_t) <= sizeof(long long),
               "counters are shared between processes");

/* What is in a slot: a chunk of a message of the same collective on all ranks. */
typedef struct {
    uint64_t bytes; /* of the message */
    uint64_t kind;  /* a tp_collective */
    uint64_t label; /* of the message; bit 0: of a backward pass */
} tp_shm_tag;

typedef struct {
    _Alignas(TP_SHM_APART) _Atomic uint64_t posted;
    tp_shm_tag tags[TP_SHM_SLOTS]; /* of what is in the slots */
    _Atomic uint64_t joined;       /* 1 once the rank holds its lock */
    _Atomic uint64_t failed;       /* 1 once a collective has failed there */
    _Alignas(TP_SHM_APART) _Atomic uint64_t read;
} tp_shm_counters;

struct tp_shm {
    int rank;
    int ranks;
    long process; /* the one that opened it: a fork would write as the same rank */
    int file; /* owned; the only descriptor of it, as closing any would drop the lock */
    int spins;      /* on a counter before the core is yielded */
    uint64_t label; /* of the call that runs */
    size_t slot;
    size_t bytes;
    tp_shm_counters *counters; /* owned, mapped: those of all ranks, then their slots */
    char *slots;               /* in the same memory */
};

/* The slot of `rank` for its chunk `chunk`, counted from 0. */
static inline char *
tp_shm_at(const tp_shm *shm, int rank, uint64_t chunk)
{
    const size_t index = (size_t)rank * TP_SHM_SLOTS + chunk % TP_SHM_SLOTS;
    return shm->slots + index * shm->slot;
}

/* Say on all ranks that nothing can follow. Always returns -1. */
static inline int
tp_shm_fail(tp_shm *shm)
{
    atomic_store_explicit(&shm->counters[shm->rank].failed, 1, memory_order_release);
    return -1;
}

/* Whether a collective has failed on `rank`. */
static inline bool
tp_shm_has_failed(const tp_shm *shm, int rank)
{
    return atomic_load_explicit(&shm->counters[rank].failed, memory_order_acquire) != 0;
}

/* Fails in a fork of the process that opened the memory. */
int tp_shm_check_process(const tp_shm *shm, tp_error *err);

/* Whether the process of `rank` has joined and ended: the lock that it held on its byte
 * of the file is gone. */
int tp_shm_has_ended(const tp_shm *shm, int rank, bool *ended, tp_error *err);

#endif
