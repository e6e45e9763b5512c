/* SPDX-License-Identifier: Apache-2.0 */
/* rank_memory.h -- what a rank holds of weights, gradients and optimizer, in bytes.
 *
 * The layouts are those of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py,
 * fp16/unfused_optimizer.py) for an optimizer with one group of parameters and
 * gradients in the data type of the weights. */
#ifndef TP_RANK_MEMORY_H
#define TP_RANK_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

#include "plan/plan.h"

/* Elements, of the options of the section zero_optimization. */
#define TP_REDUCE_BUCKET 500000000
#define TP_PERSISTENCE_THRESHOLD 100000
#define TP_MAX_LIVE_PARAMETERS 1000000000
#define TP_SUB_GROUP 1000000000

typedef struct {
    int stage;             /* of ZeRO, 0 to 3 */
    int64_t replicas;      /* data-parallel ranks */
    int states;            /* float32 values that the optimizer keeps per weight */
    const bool *trains;    /* one per entry of the plan; NULL: all */
    int64_t reduce_bucket; /* reduce_bucket_size */
    int64_t persistence;   /* stage3_param_persistence_threshold */
    int64_t max_live;      /* stage3_max_live_parameters */
    int64_t sub_group;     /* sub_group_size */
    bool overlap_comm;
} tp_memory_options;

typedef struct {
    int64_t parameters; /* weights that are trained or frozen, with padding */
    int64_t gathered;   /* full weights beside partitioned ones, at most, at stage 3 */
    int64_t gradients;  /* after a backward pass */
    int64_t master; /* float32 weights of the optimizer, where they are no parameters */
    int64_t states; /* of the optimizer */
    int64_t buckets;      /* buffers of the sums over data-parallel ranks */
    int64_t kept_buckets; /* those of them that are there all the time */
    double share; /* of its gradients that a rank keeps while they come to be; 0 where
                   * there is room for all from the start */
    int64_t step; /* what the optimizer's step has besides, for a while */
    int64_t elements;  /* of the rank's shards, a tied one once */
    int64_t trained;   /* those of them that are trained */
    int64_t item;      /* bytes of an element that is trained */
    int64_t partition; /* trained elements of a data-parallel rank's optimizer */
    int64_t fetched;   /* bytes of its partitions that are gathered in a forward pass */
    int64_t
        refreshed; /* of small tensors, that every replica has in full, after a step */
    int64_t refetched; /* and again in the backward pass; both at stage 3 */
} tp_rank_memory;

/* Of TP rank `rank`, and of its data-parallel ranks the one that holds most. Fails with
 * TP_VALUE for a stage or a number of replicas that there is not. */
int tp_rank_memory_of(const tp_plan *plan, int rank, const tp_memory_options *options,
                      tp_rank_memory *out, tp_error *err);

/* Float32 values per weight of an optimizer by the name of its class in lower case, as
 * "adamw"; fails with TP_VALUE, naming near ones. */
int tp_optimizer_states(const char *name, int *out, tp_error *err);

#endif
