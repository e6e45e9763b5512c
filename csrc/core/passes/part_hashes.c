/* SPDX-License-Identifier: Apache-2.0 */
/* part_hashes.c -- hashes of the parts of a build, to see which of them a pass changes.
 *
 * Fields are hashed one by one, because the bytes between them mean nothing. A pointer
 * stands for what it points to: what passes share is made once and then constant. */
#include "base/hash.h"
#include "passes/pass.h"

static const char *const names[] = {
    [TP_PART_FIXED] = "fixed",
    [TP_PART_CHOICES] = "choices",
    [TP_PART_STARS] = "stars",
    [TP_PART_MATCHED] = "matched",
    [TP_PART_MODULE_RULES] = "module_rules",
    [TP_PART_ATTENTIONS] = "attentions",
    [TP_PART_GEOMETRIES] = "geometries",
    [TP_PART_PAIRED] = "paired",
    [TP_PART_STACKED] = "stacked",
    [TP_PART_DECISIONS] = "decisions",
    [TP_PART_LAYOUTS] = "layouts",
    [TP_PART_EXPERTS] = "experts",
    [TP_PART_ENTRIES] = "entries",
    [TP_PART_LAYERS] = "layers",
    [TP_PART_SIBLINGS] = "siblings",
    [TP_PART_STACKS] = "stacks",
    [TP_PART_INTEGERS] = "integers",
    [TP_PART_REGIONS] = "regions",
    [TP_PART_LOGITS] = "logits",
    [TP_PART_HASH] = "hash",
    [TP_PART_MESSAGES] = "messages",
};

const char *
tp_part_name(tp_build_part part)
{
    return names[part];
}

static uint64_t
hash_pointer(uint64_t hash, const void *pointer)
{
    return tp_hash_int(hash, (int64_t)(intptr_t)pointer);
}

static uint64_t
hash_ints(uint64_t hash, const int *values, int count)
{
    return tp_hash_bytes(hash, values, (size_t)count * sizeof(*values));
}

static uint64_t
hash_flags(const bool *values, int count)
{
    return tp_hash_bytes(TP_HASH_START, values, (size_t)count * sizeof(*values));
}

static uint64_t
hash_choices(const tp_build *build)
{
    uint64_t hash = TP_HASH_START;
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const tp_choice *at = &build->choices[i];
        hash = hash_pointer(hash, at->spec);
        hash = hash_pointer(hash, at->rule);
        hash = tp_hash_int(hash, at->source);
        hash = tp_hash_int(hash, at->reason);
    }
    return hash;
}

static uint64_t
hash_geometries(const tp_build *build)
{
    uint64_t hash = TP_HASH_START;
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        const tp_geometry *at = tp_geometries_at(build->geometries, i);
        if (at == NULL)
            continue;
        hash = tp_hash_int(hash, i);
        hash = tp_hash_int(hash, at->heads.query);
        hash = tp_hash_int(hash, at->heads.key);
        hash = tp_hash_int(hash, at->head_size);
    }
    return hash;
}

static uint64_t
hash_decisions(const tp_build *build)
{
    uint64_t hash = TP_HASH_START;
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const tp_decision *at = &build->decisions[i];
        hash = tp_hash_int(hash, at->kind);
        hash = tp_hash_int(hash, at->dim);
        hash = tp_hash_int(hash, at->outer);
        hash = tp_hash_int(hash, at->inner);
        hash = hash_pointer(hash, at->layout);
        hash = tp_hash_int(hash, at->attention);
        hash = tp_hash_int(hash, at->shards_keys);
        hash = tp_hash_int(hash, at->gather_output);
        hash = tp_hash_int(hash, at->split_input);
    }
    return hash;
}

static uint64_t
hash_entries(const tp_plan *plan)
{
    uint64_t hash = TP_HASH_START;
    for (int i = 0; i < plan->entry_count; i++) {
        const tp_entry *at = &plan->entries[i];
        hash = tp_hash_int(hash, at->parameter);
        hash = tp_hash_int(hash, at->kind);
        hash = tp_hash_int(hash, at->source);
        hash = hash_pointer(hash, at->rule);
        hash = tp_hash_int(hash, at->dim);
        hash = tp_hash_int(hash, at->outer);
        hash = tp_hash_int(hash, at->inner);
        hash = hash_pointer(hash, at->layout);
    }
    return hash;
}

static uint64_t
hash_layers(const tp_plan *plan)
{
    uint64_t hash = TP_HASH_START;
    for (int i = 0; i < plan->layer_count; i++) {
        const tp_layer *at = &plan->layers[i];
        hash = tp_hash_int(hash, at->module);
        hash = tp_hash_int(hash, at->kind);
        hash = tp_hash_int(hash, at->weight);
        hash = tp_hash_int(hash, at->bias);
        hash = tp_hash_int(hash, at->gather_output);
        hash = tp_hash_int(hash, at->split_input);
        hash = tp_hash_int(hash, at->is_large);
        hash = tp_hash_list(hash, at->divided, at->divided_count);
        hash = tp_hash_int(hash, at->run_start);
        hash = tp_hash_int(hash, at->run_length);
        hash = hash_pointer(hash, at->heads);
    }
    return hash;
}

static uint64_t
hash_siblings(const tp_plan *plan)
{
    uint64_t hash = TP_HASH_START;
    for (int i = 0; i < plan->layer_count; i++) {
        const tp_layer *at = &plan->layers[i];
        if (at->sibling_count == 0)
            continue; /* as a layer is that was just made */
        hash = tp_hash_int(hash, i);
        hash = tp_hash_list(hash, at->siblings, at->sibling_count);
    }
    return hash;
}

static uint64_t
hash_stacks(const tp_plan *plan)
{
    uint64_t hash = TP_HASH_START;
    for (int i = 0; i < plan->stack_count; i++) {
        const tp_stack *at = &plan->stacks[i];
        const tp_modules *const lists[] = {&at->layers, &at->gather_input,
                                           &at->reduce_scatter_output,
                                           &at->gather_scatter, &at->norms};
        hash = tp_hash_int(hash, at->owner);
        for (size_t j = 0; j < sizeof(lists) / sizeof(lists[0]); j++)
            hash = tp_hash_list(hash, lists[j]->items, lists[j]->count);
    }
    return hash;
}

static uint64_t
hash_regions(const tp_plan *plan)
{
    const tp_modules *const lists[] = {&plan->regions.blocks,
                                       &plan->regions.replicated_dropouts,
                                       &plan->regions.sharded_dropouts};
    uint64_t hash = TP_HASH_START;
    for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]); i++)
        hash = tp_hash_list(hash, lists[i]->items, lists[i]->count);
    for (int i = 0; i < plan->layer_count; i++) {
        const tp_layer *at = &plan->layers[i];
        if (!at->opens_region && !at->closes_region)
            continue; /* as a layer is that was just made */
        hash = tp_hash_int(hash, i);
        hash = tp_hash_int(hash, at->opens_region);
        hash = tp_hash_int(hash, at->closes_region);
    }
    return hash;
}

static uint64_t
hash_integers(const tp_plan *plan)
{
    uint64_t hash = TP_HASH_START;
    for (int i = 0; i < plan->integer_count; i++) {
        const tp_local_integer *at = &plan->integers[i];
        hash = tp_hash_int(hash, at->module);
        hash = hash_pointer(hash, at->key);
        hash = tp_hash_int(hash, at->full);
        hash = hash_pointer(hash, at->values);
    }
    return hash;
}

static uint64_t
hash_stars(const tp_build *build)
{
    uint64_t hash = TP_HASH_START;
    for (int i = 0; i < tp_rules_count(build->rules); i++)
        hash = tp_hash_int(hash, build->stars[i]);
    return hash;
}

static uint64_t
hash_fixed(const tp_build *build)
{
    const int count = tp_model_parameter_count(build->model);
    const uint64_t hash = tp_hash_int(TP_HASH_START, build->plan->ranks);
    return hash_ints(hash, build->next_name, count);
}

static uint64_t
hash_messages(const tp_plan *plan)
{
    uint64_t hash = TP_HASH_START;
    for (int i = 0; i < plan->message_count; i++)
        hash = hash_pointer(hash, plan->messages[i].text);
    return hash;
}

void
tp_parts_hash(const tp_build *build, uint64_t *out)
{
    const int modules = tp_model_module_count(build->model);
    out[TP_PART_CHOICES] = hash_choices(build);
    out[TP_PART_STARS] = hash_stars(build);
    out[TP_PART_MATCHED] = hash_flags(build->matched, tp_rules_count(build->rules));
    out[TP_PART_MODULE_RULES] = hash_ints(TP_HASH_START, build->module_rules, modules);
    out[TP_PART_ATTENTIONS] = hash_ints(TP_HASH_START, build->attentions, modules);
    out[TP_PART_GEOMETRIES] = hash_geometries(build);
    out[TP_PART_PAIRED] = hash_ints(TP_HASH_START, &build->paired, 1);
    out[TP_PART_STACKED] = hash_ints(TP_HASH_START, build->stacked, modules);
    out[TP_PART_DECISIONS] = hash_decisions(build);
    out[TP_PART_FIXED] = hash_fixed(build);
    out[TP_PART_LAYOUTS] = (uint64_t)tp_layout_cache_count(build->layouts);
    out[TP_PART_EXPERTS] = hash_flags(build->experts, modules);
    out[TP_PART_ENTRIES] = hash_entries(build->plan);
    out[TP_PART_LAYERS] = hash_layers(build->plan);
    out[TP_PART_SIBLINGS] = hash_siblings(build->plan);
    out[TP_PART_STACKS] = hash_stacks(build->plan);
    out[TP_PART_REGIONS] = hash_regions(build->plan);
    out[TP_PART_INTEGERS] = hash_integers(build->plan);
    out[TP_PART_LOGITS] = (uint64_t)build->plan->logits_layer;
    out[TP_PART_HASH] = build->plan->hash;
    out[TP_PART_MESSAGES] = hash_messages(build->plan);
}
