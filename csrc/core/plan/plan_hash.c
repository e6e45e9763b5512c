/* SPDX-License-Identifier: Apache-2.0 */
/* plan_hash.c -- one hash of a plan, to compare it over ranks. */
#include "plan/plan_hash.h"

#include "base/hash.h"
#include "plan/plan_build.h"

/* Thousands of entries share a handful of layouts, so each is hashed about
 * once: a layout's pointer says where its hash is kept. */
enum { KEPT = 256 };

typedef struct {
    const tp_layout *layout[KEPT];
    uint64_t hash[KEPT];
} kept_hashes;

static uint64_t
hash_runs(const tp_layout *layout)
{
    uint64_t hash = tp_hash_int(TP_HASH_START, layout->size);
    for (int rank = 0; rank < layout->ranks; rank++) {
        const tp_shard *shard = &layout->shards[rank];
        hash = tp_hash_int(hash, shard->count);
        for (int i = 0; i < shard->count; i++) {
            const tp_run *run = &shard->runs[i];
            hash = tp_hash_int(hash, run->start);
            hash = tp_hash_int(hash, run->length);
            hash = tp_hash_int(hash, run->owner);
            hash = tp_hash_int(hash, run->holders);
        }
    }
    return hash;
}

static uint64_t
hash_layout(kept_hashes *kept, const tp_layout *layout)
{
    if (layout == NULL)
        return 0;
    const uintptr_t address = (uintptr_t)layout;
    const size_t at = (size_t)((address >> 4) ^ (address >> 12)) % KEPT;
    if (kept->layout[at] != layout) {
        kept->layout[at] = layout;
        kept->hash[at] = hash_runs(layout);
    }
    return kept->hash[at];
}

static uint64_t
hash_entry(uint64_t hash, const tp_plan *plan, const tp_entry *entry, kept_hashes *kept)
{
    const tp_parameter *at = tp_model_parameter(plan->model, entry->parameter);
    hash = tp_hash_text(hash, at->name);
    hash = tp_hash_text(hash, at->dtype);
    hash = tp_hash_int(hash, at->dims);
    for (int i = 0; i < at->dims; i++)
        hash = tp_hash_int(hash, at->shape[i]);
    hash = tp_hash_int(hash, at->tied_to);
    hash = tp_hash_int(hash, entry->kind);
    hash = tp_hash_int(hash, entry->dim);
    hash = tp_hash_int(hash, entry->outer);
    hash = tp_hash_int(hash, entry->inner);
    return tp_hash_int(hash, (int64_t)hash_layout(kept, entry->layout));
}

static uint64_t
hash_layer(uint64_t hash, const tp_plan *plan, const tp_layer *layer, kept_hashes *kept)
{
    hash = tp_hash_text(hash, tp_model_module(plan->model, layer->module)->name);
    hash = tp_hash_int(hash, layer->kind);
    hash = tp_hash_int(hash, layer->weight);
    hash = tp_hash_int(hash, layer->bias);
    hash = tp_hash_int(hash, layer->gather_output);
    hash = tp_hash_int(hash, layer->split_input);
    hash = tp_hash_int(hash, layer->opens_region);
    hash = tp_hash_int(hash, layer->closes_region);
    hash = tp_hash_list(hash, layer->divided, layer->divided_count);
    hash = tp_hash_list(hash, layer->siblings, layer->sibling_count);
    hash = tp_hash_int(hash, layer->run_start);
    hash = tp_hash_int(hash, layer->run_length);
    return tp_hash_int(hash, (int64_t)hash_layout(kept, layer->heads));
}

static uint64_t
hash_integer(uint64_t hash, const tp_plan *plan, const tp_local_integer *integer)
{
    hash = tp_hash_text(hash, tp_model_module(plan->model, integer->module)->name);
    hash = tp_hash_text(hash, integer->key);
    for (int rank = 0; rank < plan->ranks; rank++)
        hash = tp_hash_int(hash, integer->values[rank]);
    return hash;
}

static uint64_t
hash_modules(uint64_t hash, const tp_modules *modules)
{
    return tp_hash_list(hash, modules->items, modules->count);
}

static uint64_t
hash_stack(uint64_t hash, const tp_stack *stack)
{
    hash = tp_hash_int(hash, stack->owner);
    hash = hash_modules(hash, &stack->layers);
    hash = hash_modules(hash, &stack->gather_input);
    hash = hash_modules(hash, &stack->reduce_scatter_output);
    hash = hash_modules(hash, &stack->norms);
    hash = tp_hash_int(hash, stack->streams_first);
    return hash_modules(hash, &stack->gather_scatter);
}

uint64_t
tp_plan_hash_make(const tp_plan *plan)
{
    kept_hashes kept = {{NULL}, {0}};
    uint64_t hash = tp_hash_int(TP_HASH_START, plan->ranks);
    hash = tp_hash_int(hash, plan->entry_count);
    for (int i = 0; i < plan->entry_count; i++)
        hash = hash_entry(hash, plan, &plan->entries[i], &kept);
    hash = tp_hash_int(hash, plan->layer_count);
    for (int i = 0; i < plan->layer_count; i++)
        hash = hash_layer(hash, plan, &plan->layers[i], &kept);
    hash = hash_modules(hash, &plan->regions.blocks);
    hash = hash_modules(hash, &plan->regions.replicated_dropouts);
    hash = hash_modules(hash, &plan->regions.sharded_dropouts);
    hash = tp_hash_int(hash, plan->logits_layer);
    hash = tp_hash_int(hash, plan->integer_count);
    for (int i = 0; i < plan->integer_count; i++)
        hash = hash_integer(hash, plan, &plan->integers[i]);
    hash = tp_hash_int(hash, plan->stack_count);
    for (int i = 0; i < plan->stack_count; i++)
        hash = hash_stack(hash, &plan->stacks[i]);
    return hash;
}

uint64_t
tp_plan_layout_hash(const tp_plan *plan)
{
    kept_hashes kept = {{NULL}, {0}};
    uint64_t hash = tp_hash_int(TP_HASH_START, plan->ranks);
    for (int i = 0; i < plan->entry_count; i++) {
        const tp_entry *entry = &plan->entries[i];
        const tp_parameter *at = tp_model_parameter(plan->model, i);
        hash = tp_hash_text(hash, at->name);
        for (int dim = 0; dim < at->dims; dim++)
            hash = tp_hash_int(hash, at->shape[dim]);
        hash = tp_hash_int(hash, entry->outer);
        hash = tp_hash_int(hash, entry->inner);
        hash = tp_hash_int(hash, (int64_t)hash_layout(&kept, entry->layout));
    }
    return hash;
}
