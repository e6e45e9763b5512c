/* SPDX-License-Identifier: Apache-2.0 */
/* collectives.h -- sums and gathers over the ranks of one host.
 *
 * Every rank posts a message and then reads the result, in the same order on all ranks
 * and one collective at a time. A message that is posted can be read at once: nothing
 * has to run for it while the rank computes. Sums are formed in the order of the ranks,
 * so they have the same bits on all of them. */
#ifndef TP_COLLECTIVES_H
#define TP_COLLECTIVES_H

#include <stdbool.h>

#include "shared_memory/shm.h"

/* What is done with the messages: a sum in a type, or a gather. */
typedef enum { TP_SUM_F32, TP_SUM_F64, TP_SUM_BF16, TP_GATHER } tp_collective;

/* What a rank contributes; its memory stays as it is until the result was read. */
typedef struct {
    const void *from;   /* borrowed */
    size_t bytes;       /* the same on every rank */
    tp_collective kind; /* likewise */
    bool backward;      /* likewise: whether it is of a backward pass */
} tp_collective_message;

/* Post as much of a message as there is room for. Fails as tp_wait does, as do the
 * others; they also fail, on all ranks, where messages differ or belong to different
 * calls, and in a fork of the process that opened the memory, where they change
 * nothing. */
int tp_collective_post(tp_shm *shm, const tp_collective_message *message,
                       double seconds, tp_error *err);

/* Write items [first, first + count) of the sum of all ranks' messages to `to`, which
 * may be the place of these very items in the message. bfloat16 is summed in float32.
 */
int tp_collective_sum(tp_shm *shm, const tp_collective_message *message, size_t first,
                      size_t count, void *to, double seconds, tp_error *err);

/* Write all ranks' messages to `to`, one after the other. */
int tp_collective_gather(tp_shm *shm, const tp_collective_message *message, void *to,
                         double seconds, tp_error *err);

#endif
