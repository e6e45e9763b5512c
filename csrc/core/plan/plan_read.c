/* SPDX-License-Identifier: Apache-2.0 */
/* plan_read.c -- what happens to every parameter: reading. */
#include "plan/plan_build.h"

#include <stdlib.h>

const char *
tp_kind_name(tp_kind kind)
{
    static const char *const names[] = {
        [TP_REPLICATED] = "replicated",
        [TP_REPLICATED_SUM] = "replicated+sum",
        [TP_SKIPPED] = "skip",
        [TP_COLUMN] = "column",
        [TP_ROW] = "row",
        [TP_VOCABULARY] = "vocabulary",
        [TP_HIDDEN] = "hidden",
        [TP_EXPERTS] = "experts",
        [TP_WHOLE_EXPERTS] = "whole experts",
        [TP_WHOLE_EXPERT_BLOCKS] = "whole expert blocks",
        [TP_EXPERTS_COLUMN] = "experts column",
        [TP_EXPERTS_ROW] = "experts row",
        [TP_SHARE] = "share",
        [TP_ROPE] = "rope",
        [TP_NORM] = "norm",
        [TP_HEADS] = "heads",
    };
    return names[kind];
}

int
tp_plan_ranks(const tp_plan *plan)
{
    return plan->ranks;
}

int
tp_plan_entry_count(const tp_plan *plan)
{
    return plan->entry_count;
}

const tp_entry *
tp_plan_entry(const tp_plan *plan, int index)
{
    return &plan->entries[index];
}

int
tp_plan_layer_count(const tp_plan *plan)
{
    return plan->layer_count;
}

const tp_layer *
tp_plan_layer(const tp_plan *plan, int index)
{
    return &plan->layers[index];
}

int
tp_plan_integer_count(const tp_plan *plan)
{
    return plan->integer_count;
}

const tp_local_integer *
tp_plan_integer(const tp_plan *plan, int index)
{
    return &plan->integers[index];
}

const tp_regions *
tp_plan_regions(const tp_plan *plan)
{
    return &plan->regions;
}

int
tp_plan_stack_count(const tp_plan *plan)
{
    return plan->stack_count;
}

const tp_stack *
tp_plan_stack(const tp_plan *plan, int index)
{
    return &plan->stacks[index];
}

int
tp_plan_logits_layer(const tp_plan *plan)
{
    return plan->logits_layer;
}

bool
tp_plan_skips_all(const tp_plan *plan)
{
    bool skips = false;
    for (int i = 0; i < plan->entry_count; i++) {
        const tp_entry *entry = &plan->entries[i];
        const bool by_rule =
            entry->source != TP_FROM_NOTHING && entry->source != TP_FROM_DEFAULT;
        if (entry->layout != NULL || entry->kind == TP_REPLICATED_SUM ||
            (by_rule && entry->kind != TP_SKIPPED))
            return false;
        skips |= by_rule;
    }
    return skips;
}

int
tp_plan_message_count(const tp_plan *plan)
{
    return plan->message_count;
}

const tp_message *
tp_plan_message(const tp_plan *plan, int index)
{
    return &plan->messages[index];
}

uint64_t
tp_plan_hash(const tp_plan *plan)
{
    return plan->hash;
}

void
tp_plan_local_shape(const tp_plan *plan, int entry, int rank, int64_t *shape)
{
    const tp_entry *at = &plan->entries[entry];
    const tp_parameter *parameter = tp_model_parameter(plan->model, at->parameter);
    for (int i = 0; i < parameter->dims; i++)
        shape[i] = parameter->shape[i];
    if (at->layout != NULL)
        shape[at->dim] =
            shape[at->dim] / at->layout->size * at->layout->shards[rank].width;
}

bool
tp_plan_is_counted(const tp_plan *plan, int entry, int rank)
{
    const tp_layout *layout = plan->entries[entry].layout;
    if (layout == NULL)
        return false;
    const tp_shard *shard = &layout->shards[rank];
    for (int i = 0; i < shard->count; i++)
        if (shard->runs[i].owner == rank)
            return true;
    return false;
}

void
tp_plan_free(tp_plan *plan)
{
    if (plan == NULL)
        return;
    tp_arena_free(plan->arena);
    free(plan);
}
