/* SPDX-License-Identifier: Apache-2.0 */
/* traffic.h -- what a step sends between ranks, and for how long.
 *
 * The bytes of a collective are those that a rank gives to it: the full tensor of an
 * all-reduce or a reduce-scatter, the own shard of an all-gather. */
#ifndef TP_TRAFFIC_H
#define TP_TRAFFIC_H

#include "cost/rank_memory.h"

typedef enum {
    TP_ALL_REDUCE,
    TP_ALL_GATHER,
    TP_REDUCE_SCATTER,
    TP_BROADCAST,
    TP_COLLECTIVES
} tp_collective;

/* "all-reduce", "all-gather", "reduce-scatter", "broadcast". */
const char *tp_collective_name(tp_collective kind);

/* The kind of that name; fails with TP_VALUE. */
int tp_collective_of(const char *name, tp_collective *out, tp_error *err);

/* Seconds on a ring of `ranks`, each of which sends `bandwidth` bytes per second
 * (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms"); latency is not
 * counted. */
double tp_collective_seconds(tp_collective kind, int64_t bytes, int64_t ranks,
                             double bandwidth);

enum { TP_REPLICA_TRAFFIC = 4 };

typedef struct {
    tp_collective kind;
    int64_t bytes; /* of all collectives of this kind and purpose in a step */
    const char *purpose;
} tp_replica_traffic;

/* What a step sends between data-parallel ranks, of a rank with this memory; at most
 * TP_REPLICA_TRAFFIC rows. Returns how many. */
int tp_replica_traffic_of(const tp_memory_options *options,
                          const tp_rank_memory *memory, tp_replica_traffic *rows);

#endif
