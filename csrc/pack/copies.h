/* SPDX-License-Identifier: Apache-2.0 */
/* copies.h -- a list of strided copies, made from the runs of shards.
 *
 * Lists what copy.cu copies on a GPU; touches no tensor's memory. */
#ifndef TP_COPIES_H
#define TP_COPIES_H

#include "core/base/error.h"
#include "pack/copy.h"
#include "pack/shard.h"

typedef struct {
    tp_copy *items; /* owned */
    int64_t count;
    int64_t room;
} tp_copies;

#define TP_NO_COPIES \
    {                \
        NULL, 0, 0   \
    }

/* Add what packs the runs of a checked view: from the full tensor to the shard, one
 * after the other. Fails with TP_MEMORY; the list is then as long as it was, or longer.
 */
int tp_copies_pack(tp_copies *list, const tp_shard_view *view, const void *full,
                   void *shard, tp_error *err);

/* Add what writes the shard back to its runs, which share no element. */
int tp_copies_unpack(tp_copies *list, const tp_shard_view *view, void *full,
                     const void *shard, tp_error *err);

/* As tp_copies_pack for a view of one outer row or of one run, in the order of
 * addresses: for memory that overlaps with the shard, which is at a lower address. */
int tp_copies_in_order(tp_copies *list, const tp_shard_view *view, const void *full,
                       void *shard, tp_error *err);

/* Release the list; NULL items are fine. */
void tp_copies_clear(tp_copies *list);

#endif
