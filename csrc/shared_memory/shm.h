/* SPDX-License-Identifier: Apache-2.0 */
/* shm.h -- memory that the ranks of one host share.
 *
 * Made by rank 0, joined by the others, then unlinked from the file system: it lives
 * until the last rank has closed it, however their processes end. */
#ifndef TP_SHM_H
#define TP_SHM_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/error.h"

typedef struct tp_shm tp_shm;

/* Rank 0 makes the memory under a `name` as of shm_open(3), which must not exist
 * before, with slots of `slot` bytes for `ranks` ranks, and reserves it all, so that
 * nothing fails later where /dev/shm is small. Then the others join. */
int tp_shm_open(tp_shm **made, const char *name, int rank, int ranks, size_t slot,
                tp_error *err);

/* Remove the name, once all have joined. */
void tp_shm_unlink(const char *name);

void tp_shm_close(tp_shm *shm);

/* Say to which call of the model the messages from now on belong: its number, and a
 * digest of its inputs. Messages of one size may belong to different ones. */
void tp_shm_set_call(tp_shm *shm, uint64_t call, uint64_t digest);

int tp_shm_ranks(const tp_shm *shm);

#endif
