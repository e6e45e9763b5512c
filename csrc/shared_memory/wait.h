/* SPDX-License-Identifier: Apache-2.0 */
/* wait.h -- how a rank waits for the others in shared memory.
 *
 * By polling: first in a busy loop, since ranks are mostly microseconds apart and a
 * wake-up by the kernel takes fifty, then yielding its core, then in short sleeps. */
#ifndef TP_WAIT_H
#define TP_WAIT_H

#include "shared_memory/shm_layout.h"

typedef enum { TP_POSTED, TP_READ } tp_progress;

/* Wait until every other rank has posted, or read, `count` chunks, for `seconds` at
 * the most for each rank. Fails with TP_PEER, naming the rank, when time is up, when
 * any rank has ended or a collective has failed there, which begins with "no answer in
 * shared memory", and from then on at once. */
int tp_wait(tp_shm *shm, tp_progress what, uint64_t count, double seconds,
            tp_error *err);

#endif
