/* SPDX-License-Identifier: Apache-2.0 */
/* reduce.h -- sums and gathers over the ranks of one host.
 *
 * A message is what every rank posts and then takes, all ranks their messages in the
 * same order, and one at a time. What is posted is on its way at once: nothing has to
 * run for it while the rank computes. Sums are formed in the order of the ranks, so
 * they have the same bits on all of them. */
#ifndef TP_REDUCE_H
#define TP_REDUCE_H

#include <stdint.h>

#include "shm.h"

typedef enum { TP_F32, TP_F64, TP_BF16 } tp_summed;

/* What a rank hands over; its memory stays as it is until it was taken. */
typedef struct {
    const void *from; /* borrowed */
    size_t bytes;     /* the same on every rank */
} tp_message;

/* Lay out as much of a message as there is room for. Fails as tp_wait does. */
int tp_post(tp_shm *shm, const tp_message *message, double seconds, tp_error *err);

/* Write items [first, first + count) of the sum of all ranks' messages, which are
 * numbers of `type`, to `to`. 16-bit floats are summed in float32. `to` may be the
 * place of these very items in the message. */
int tp_take_sum(tp_shm *shm, const tp_message *message, tp_summed type, size_t first,
                size_t count, void *to, double seconds, tp_error *err);

/* Write all ranks' messages to `to`, one after the other. */
int tp_take_all(tp_shm *shm, const tp_message *message, void *to, double seconds,
                tp_error *err);

#endif
