/* SPDX-License-Identifier: Apache-2.0 */
/* shm_ranks.h -- processes that share memory, for the tests of it. */
#ifndef TP_TEST_SHM_RANKS_H
#define TP_TEST_SHM_RANKS_H

#include <stdint.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "shared_memory/collectives.h"

enum { SLOT = 4096, MOST = 40000 };

static const double PATIENCE = 20;

/* What a rank does; 0 is right. */
typedef int (*rank_work)(tp_shm *shm, int rank, int ranks);

static void
name_of_run(char *name, size_t size)
{
    static int runs;
    snprintf(name, size, "/autotp-test-%ld-%d", (long)getpid(), runs++);
}

static int
join_and_work(const char *name, int rank, int ranks, rank_work work)
{
    tp_error err = TP_NO_ERROR;
    tp_shm *shm = NULL;

    if (tp_shm_open(&shm, name, rank, ranks, SLOT, &err) < 0)
        return 90;
    const int wrong = work(shm, rank, ranks);
    tp_shm_close(shm);
    return wrong;
}

/* Run `work` in a process for each rank; the first exit status that is not 0. This one
 * is rank 0, and makes the memory before there are others. */
static int
run_ranks(int ranks, rank_work work)
{
    char name[64];
    tp_error err = TP_NO_ERROR;
    tp_shm *first = NULL;
    int wrong = 0;

    name_of_run(name, sizeof(name));
    if (!CHECK_OK(tp_shm_open(&first, name, 0, ranks, SLOT, &err), &err))
        return -1;
    for (int rank = 1; rank < ranks; rank++) {
        const pid_t child = fork();
        if (child == 0)
            _exit(join_and_work(name, rank, ranks, work));
    }
    const int own = work(first, 0, ranks);
    for (int rank = 1; rank < ranks; rank++) {
        int status = 0;
        wait(&status);
        if (wrong == 0)
            wrong = WIFEXITED(status) ? WEXITSTATUS(status) : 99;
    }
    tp_shm_unlink(name);
    tp_shm_close(first);
    return own != 0 ? own : wrong;
}

#endif
