/* SPDX-License-Identifier: Apache-2.0 */
/* shm.c -- making, joining and leaving the memory.
 *
 * A rank holds a lock on its byte of the file, which the kernel drops when the process
 * ends, whatever ends it, and also when the process was not waited for yet. */
#define _GNU_SOURCE /* sched_getaffinity */

#include "shared_memory/shm.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shared_memory/shm_layout.h"

enum {
    kPage = 4096,
    kSpins = 2000 /* some 50 us */
};

static size_t
head_bytes(int ranks)
{
    const size_t bytes = (size_t)ranks * sizeof(tp_shm_counters);
    return (bytes + kPage - 1) / kPage * kPage;
}

static struct flock
lock_of(int rank)
{
    const struct flock lock = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
    return lock;
}

/* A busy loop helps only where every rank has a core of its own. */
static int
useful_spins(int ranks)
{
    cpu_set_t cores;

    if (sched_getaffinity(0, sizeof(cores), &cores) < 0)
        return 0;
    return CPU_COUNT(&cores) >= ranks ? kSpins : 0;
}

static int
fail_with(tp_error *err, const char *what, int code)
{
    return tp_fail(err, TP_PEER, "shared memory cannot be %s: %s", what,
                   strerror(code));
}

/* Reserve, lock and map the file. */
static int
map_file(tp_shm *shm, tp_error *err)
{
    struct flock lock = lock_of(shm->rank);
    struct stat status;
    int reserved = 0;

    if (shm->rank == 0)
        reserved = posix_fallocate(shm->file, 0, (off_t)shm->bytes);
    if (reserved != 0)
        return fail_with(err, "reserved", reserved);
    if (fstat(shm->file, &status) < 0 || status.st_size != (off_t)shm->bytes)
        return tp_fail(err, TP_PEER, "shared memory has %lld bytes, expected %lld",
                       (long long)status.st_size, (long long)shm->bytes);
    if (status.st_uid != geteuid() || (status.st_mode & (S_IRWXG | S_IRWXO)) != 0)
        return tp_fail(err, TP_PEER, "shared memory is open to another user");
    if (fcntl(shm->file, F_SETLK, &lock) < 0)
        return fail_with(err, "locked", errno);
    void *memory =
        mmap(NULL, shm->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, shm->file, 0);
    if (memory == MAP_FAILED)
        return fail_with(err, "mapped", errno);
    shm->counters = memory;
    shm->slots = (char *)memory + head_bytes(shm->ranks);
    atomic_store_explicit(&shm->counters[shm->rank].joined, 1, memory_order_release);
    return 0;
}

int
tp_shm_open(tp_shm **made, const char *name, int rank, int ranks, size_t slot,
            tp_error *err)
{
    const int flags = rank == 0 ? O_RDWR | O_CREAT | O_EXCL : O_RDWR;
    tp_shm *shm = calloc(1, sizeof(*shm));

    if (shm == NULL)
        return tp_fail_memory(err);
    shm->rank = rank;
    shm->ranks = ranks;
    shm->process = (long)getpid();
    shm->slot = slot;
    shm->spins = useful_spins(ranks);
    shm->bytes = head_bytes(ranks) + (size_t)ranks * TP_SHM_SLOTS * slot;
    shm->file = shm_open(name, flags, 0600);
    if (shm->file < 0) {
        fail_with(err, "opened", errno);
        free(shm);
        return -1;
    }
    if (map_file(shm, err) < 0) {
        if (rank == 0)
            shm_unlink(name);
        close(shm->file);
        free(shm);
        return -1;
    }
    *made = shm;
    return 0;
}

void
tp_shm_unlink(const char *name)
{
    shm_unlink(name);
}

void
tp_shm_close(tp_shm *shm)
{
    if (shm == NULL)
        return;
    munmap(shm->counters, shm->bytes);
    close(shm->file);
    free(shm);
}

void
tp_shm_set_call(tp_shm *shm, uint64_t call, uint64_t digest)
{
    const uint64_t calls = ((uint64_t)1 << TP_SHM_CALL_BITS) - 1;

    shm->label = digest << (TP_SHM_CALL_BITS + 1) | (call & calls) << 1;
}

int
tp_shm_ranks(const tp_shm *shm)
{
    return shm->ranks;
}

int
tp_shm_check_process(const tp_shm *shm, tp_error *err)
{
    const long process = (long)getpid();

    if (process == shm->process)
        return 0;
    return tp_fail(
        err, TP_PEER,
        "process %ld is a fork of process %ld, which is rank %d of the group: "
        "two processes of a rank would mix up its collectives; call the model "
        "in the process that sharded it",
        process, shm->process, shm->rank);
}

int
tp_shm_has_ended(const tp_shm *shm, int rank, bool *ended, tp_error *err)
{
    const bool joined =
        atomic_load_explicit(&shm->counters[rank].joined, memory_order_acquire) != 0;
    struct flock lock = lock_of(rank);

    if (fcntl(shm->file, F_GETLK, &lock) < 0)
        return fail_with(err, "asked for its ranks", errno);
    *ended = joined && lock.l_type == F_UNLCK;
    return 0;
}
