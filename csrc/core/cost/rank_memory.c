/* SPDX-License-Identifier: Apache-2.0 */
/* rank_memory.c -- what a rank holds of weights, gradients and optimizer, in bytes. */
#include "cost/rank_memory.h"

#include <string.h>

#include "base/did_you_mean.h"
#include "base/text.h"
#include "plan/plan_build.h"

enum { STAGES = 3, FLOAT32 = 4, MOST_REPLICAS = 1 << 24 };

/* Elements; with these bounds, and that of a model, everything fits 64 bits. */
static const int64_t most_bucket = (int64_t)1 << 48;

/* Flat buffers are a multiple of twice the data-parallel ranks. */
static const int64_t alignment = 2;

static const struct {
    const char *name;
    int states;
} optimizers[] = {
    {"adamw", 2},    {"adam", 2},         {"adamax", 2},  {"nadam", 2}, {"radam", 2},
    {"adadelta", 2}, {"rprop", 2},        {"adagrad", 1}, {"asgd", 1},  {"lion", 1},
    {"rmsprop", 1},  {"sgd_momentum", 1}, {"sgd", 0},
};
enum { OPTIMIZERS = sizeof(optimizers) / sizeof(*optimizers) };

int
tp_optimizer_states(const char *name, int *out, tp_error *err)
{
    const char *names[OPTIMIZERS];
    for (int i = 0; i < OPTIMIZERS; i++) {
        names[i] = optimizers[i].name;
        if (strcmp(name, names[i]) == 0) {
            *out = optimizers[i].states;
            return 0;
        }
    }
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "optimizer: got '%s', expected one whose states are known",
                name);
    tp_did_you_mean_add(&text, name, names, OPTIMIZERS);
    return tp_text_fail(&text, TP_VALUE, err);
}

/* Of one replica's partition of a flat buffer, and of the tensors that reach into it.
 */
typedef struct {
    int64_t partition; /* elements, the same for all replicas */
    int64_t
        reaching; /* elements of the tensors and of padding; of the largest replica */
} flat_share;

static int64_t
round_up(int64_t value, int64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

static int64_t
larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t
smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t
local_elements(const tp_plan *plan, int entry, int rank)
{
    int64_t shape[TP_MAX_DIMS];
    int64_t elements = 1;
    tp_plan_local_shape(plan, entry, rank, shape);
    for (int i = 0; i < tp_model_parameter(plan->model, entry)->dims; i++)
        elements *= shape[i];
    return elements;
}

/* Whether the entry is a tensor of its own, that is trained. */
static bool
is_trained(const tp_plan *plan, int entry, const tp_memory_options *options)
{
    return tp_model_parameter(plan->model, entry)->tied_to < 0 &&
           (options->trains == NULL || options->trains[entry]);
}

/* The gradients of a replica are those of all tensors that reach into its partition,
 * each in full, and zeros where tensors end before the partition does. Tensors come in
 * order, so one pass follows the partitions. */
static flat_share
share_of(const tp_plan *plan, int rank, const tp_memory_options *options,
         int64_t trained)
{
    flat_share share = {0, 0};
    const int64_t aligned = round_up(trained, alignment * options->replicas);
    share.partition = aligned / options->replicas;
    int64_t from = 0;    /* of the tensor */
    int64_t replica = 0; /* whose partition is followed */
    int64_t reaching = 0;
    for (int i = 0; i < plan->entry_count; i++) {
        const int64_t size =
            is_trained(plan, i, options) ? local_elements(plan, i, rank) : 0;
        if (size == 0)
            continue;
        reaching += size;
        while (from + size > (replica + 1) * share.partition) {
            share.reaching = larger(share.reaching, reaching);
            replica++;
            reaching = size;
        }
        if (from + size == (replica + 1) * share.partition) {
            share.reaching = larger(share.reaching, reaching);
            replica++;
            reaching = 0;
        }
        from += size;
    }
    if (replica < options->replicas) {
        const int64_t padding = (replica + 1) * share.partition - from;
        share.reaching = larger(share.reaching, reaching + padding);
    }
    return share;
}

static int
check(const tp_plan *plan, int rank, const tp_memory_options *options, tp_error *err)
{
    if (rank < 0 || rank >= plan->ranks)
        return tp_fail(err, TP_VALUE, "rank: got %d, expected 0 to %d", rank,
                       plan->ranks - 1);
    if (options->stage < 0 || options->stage > STAGES)
        return tp_fail(err, TP_VALUE,
                       "stage: got %d, expected 0 to %d, a stage of ZeRO",
                       options->stage, STAGES);
    if (options->replicas < 1 || options->replicas > MOST_REPLICAS)
        return tp_fail(err, TP_VALUE, "replicas: got %lld, expected 1 to %d",
                       (long long)options->replicas, MOST_REPLICAS);
    if (options->reduce_bucket < 0 || options->reduce_bucket > most_bucket)
        return tp_fail(err, TP_VALUE,
                       "reduce_bucket_size: got %lld, expected 0 to %lld elements",
                       (long long)options->reduce_bucket, (long long)most_bucket);
    return 0;
}

/* Sums over the shards of a rank. */
typedef struct {
    int64_t bytes;     /* of all, trained and frozen */
    int64_t item;      /* bytes of an element that is trained, the largest; else 4 */
    int64_t per_param; /* elements of a partition of each trained tensor, padded */
    int64_t sub_group; /* those of the tensors that stage 3 updates together, at most */
    int64_t frozen;    /* bytes of frozen tensors */
    int64_t frozen_partition; /* bytes of a partition of each frozen tensor */
    int64_t persistent; /* bytes of the tensors that stay on each replica at stage 3 */
    int64_t persistent_partition; /* bytes of a partition of each of them */
    int64_t other;                /* elements of the others */
    int64_t other_partition;      /* bytes of a partition of each of the others */
} sums;

/* What of a tensor stays on each replica at stage 3, and what is gathered from their
 * partitions, for each module that has it. */
static void
add_gathered(sums *found, int64_t bytes, int64_t part, bool is_small, bool is_again)
{
    if (!is_small)
        found->other_partition += part;
    else if (!is_again) {
        found->persistent += bytes;
        found->persistent_partition += part;
    }
}

static sums
sum_shards(const tp_plan *plan, int rank, const tp_memory_options *options,
           tp_rank_memory *out)
{
    sums found = {0};
    int64_t together = 0; /* of the tensors of a sub-group */
    for (int i = 0; i < plan->entry_count; i++) {
        const tp_parameter *at = tp_model_parameter(plan->model, i);
        const int64_t size = local_elements(plan, i, rank);
        const int64_t part = (size + options->replicas - 1) / options->replicas;
        const bool is_small = size <= options->persistence;
        add_gathered(&found, size * at->itemsize, part * at->itemsize, is_small,
                     at->tied_to >= 0);
        if (at->tied_to >= 0)
            continue;
        const bool trained = is_trained(plan, i, options);
        out->elements += size;
        out->trained += trained ? size : 0;
        found.bytes += size * at->itemsize;
        found.frozen += trained ? 0 : size * at->itemsize;
        found.frozen_partition += trained ? 0 : part * at->itemsize;
        found.per_param += trained ? part : 0;
        together += trained ? part : 0;
        found.sub_group = larger(found.sub_group, together);
        together = together >= options->sub_group ? 0 : together;
        found.item = trained ? larger(found.item, at->itemsize) : found.item;
        found.other += is_small ? 0 : size;
    }
    found.item = found.item == 0 ? FLOAT32 : found.item;
    return found;
}

/* The optimizer's own float32 weights and states, and what its step has for a while:
 * the gradients in float32, where they are not, and one more value per weight, the root
 * of the second moment. */
static void
add_optimizer(tp_rank_memory *out, int64_t weights, int64_t item, bool has_master,
              const tp_memory_options *options)
{
    out->master = has_master ? weights * FLOAT32 : 0;
    out->partition = weights;
    out->states = weights * FLOAT32 * options->states;
    out->step = weights * FLOAT32 * ((item < FLOAT32 ? 1 : 0) + (options->states > 0));
}

static void
unpartitioned(tp_rank_memory *out, const sums *found, const tp_memory_options *options)
{
    out->parameters = found->bytes;
    out->gradients = out->trained * found->item;
    out->share = 1;
    add_optimizer(out, out->trained, found->item, found->item < FLOAT32, options);
    if (options->replicas > 1)
        out->buckets = smaller(out->trained, TP_REDUCE_BUCKET) * found->item;
}

static void
flat_groups(tp_rank_memory *out, const sums *found, flat_share share,
            const tp_memory_options *options)
{
    out->parameters = found->frozen + share.partition * options->replicas * found->item;
    out->gradients = share.reaching * found->item;
    out->share = (double)share.reaching / (double)out->trained;
    add_optimizer(out, share.partition, found->item, true, options);
    out->step += share.partition * found->item; /* gradients of the partition, joined */
    out->buckets =
        options->reduce_bucket * found->item * (options->overlap_comm ? 2 : 1);
}

static void
partitioned(tp_rank_memory *out, const sums *found, const tp_memory_options *options)
{
    const int64_t live = smaller(found->other, options->max_live) * found->item;
    out->parameters = found->per_param * found->item + found->frozen_partition;
    out->gathered = found->persistent + live;
    out->fetched = found->other_partition;
    out->refreshed = found->persistent_partition;
    out->refetched = found->other > options->max_live ? found->other_partition : 0;
    out->gradients = found->per_param * found->item;
    add_optimizer(out, found->per_param, found->item, true, options);
    /* Gradients are joined as float32 and weights updated sub-group by sub-group. */
    out->step = found->sub_group * FLOAT32 * (1 + (options->states > 0));
    out->buckets = options->reduce_bucket * found->item;
    out->kept_buckets = out->buckets;
}

int
tp_rank_memory_of(const tp_plan *plan, int rank, const tp_memory_options *options,
                  tp_rank_memory *out, tp_error *err)
{
    *out = (tp_rank_memory){0};
    if (check(plan, rank, options, err) < 0)
        return -1;
    const sums found = sum_shards(plan, rank, options, out);
    out->item = found.item;
    if (out->trained == 0) {
        out->parameters = found.bytes;
        return 0;
    }
    if (options->stage == 0)
        unpartitioned(out, &found, options);
    else if (options->stage < STAGES)
        flat_groups(out, &found, share_of(plan, rank, options, out->trained), options);
    else
        partitioned(out, &found, options);
    return 0;
}
