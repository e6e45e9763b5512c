/* SPDX-License-Identifier: Apache-2.0 */
/* layer_facts.c -- what follows from a layer of a plan. */
#include "plan/layer_facts.h"

#include <string.h>

#include "plan/plan_build.h"

void
tp_layer_features(const tp_plan *plan, int layer, tp_features *out)
{
    const tp_layer *at = &plan->layers[layer];
    *out = (tp_features){0};
    if (at->heads != NULL) {
        out->layout = at->heads;
        out->size = at->heads->size;
    } else if (at->kind == TP_ROPE) {
        out->run = (tp_run){at->run_start, at->run_length, 0, plan->ranks};
        out->size = at->run_start + at->run_length;
    } else if (at->weight >= 0 && plan->entries[at->weight].layout != NULL) {
        out->layout = plan->entries[at->weight].layout;
        out->size = out->layout->size;
    }
}

bool
tp_layer_has_full_output(const tp_layer *layer)
{
    switch (layer->kind) {
        case TP_ROW:
        case TP_VOCABULARY:
        case TP_HIDDEN:
        case TP_EXPERTS:
        case TP_WHOLE_EXPERTS:
        case TP_WHOLE_EXPERT_BLOCKS:
        case TP_EXPERTS_ROW:
            return true;
        default:
            return layer->gather_output;
    }
}

bool
tp_layer_gathers_weight(const tp_layer *layer)
{
    return layer->kind == TP_COLUMN && layer->gather_output;
}

static bool
is_heuristic(const tp_entry *entry)
{
    return entry->source == TP_FROM_HEURISTIC && entry->layout != NULL;
}

static bool
is_experts(const tp_layer *layer)
{
    return layer->kind == TP_EXPERTS || layer->kind == TP_WHOLE_EXPERTS ||
           layer->kind == TP_WHOLE_EXPERT_BLOCKS;
}

bool
tp_layer_is_heuristic(const tp_plan *plan, int layer)
{
    const tp_layer *at = &plan->layers[layer];
    if (!is_experts(at))
        return at->weight >= 0 && !at->gather_output && !at->split_input &&
               plan->entries[at->weight].source == TP_FROM_HEURISTIC;
    for (int i = 0; i < plan->entry_count; i++) {
        const int module = tp_model_parameter(plan->model, i)->module;
        if (is_heuristic(&plan->entries[i]) &&
            tp_model_is_inside(plan->model, module, at->module))
            return true;
    }
    return false;
}

/* Whether a block may go by this layer: attention that only takes its own heads is
 * sharded by its layers, and an individually sharded layer is a block of its own. */
static bool
is_bound(const tp_layer *layer)
{
    return layer->kind != TP_HEADS && !layer->is_large;
}

static int
add_pattern(const char *name, tp_arena *arena, tp_names *out, tp_error *err)
{
    char *pattern = tp_names_starred(arena, name, err);
    if (pattern == NULL)
        return -1;
    for (int i = 0; i < out->count; i++)
        if (strcmp(out->names[i], pattern) == 0)
            return 0;
    out->names[out->count++] = pattern;
    return 0;
}

int
tp_layer_block(const tp_plan *plan, int layer, tp_arena *arena, tp_names *out,
               tp_error *err)
{
    const tp_model *model = plan->model;
    const int parent = tp_model_module(model, plan->layers[layer].module)->parent;
    const size_t room = (size_t)plan->layer_count + 1;
    bool direct = true;
    *out = (tp_names){0};
    out->names = tp_arena_take(arena, room, sizeof(*out->names), err);
    if (out->names == NULL)
        return -1;
    for (int i = 0; i < plan->layer_count; i++) {
        const int module = plan->layers[i].module;
        if (!is_bound(&plan->layers[i]) || !tp_model_is_inside(model, module, parent))
            continue;
        if (tp_model_module(model, module)->parent != parent)
            direct = false;
        else if (add_pattern(tp_model_module(model, module)->name, arena, out, err) < 0)
            return -1;
    }
    const char *name = parent < 0 ? "" : tp_model_module(model, parent)->name;
    /* A list may hold blocks of several kinds. */
    if (!direct || name[0] == '\0' || tp_names_is_index(tp_names_leaf(name)))
        return 0;
    out->count = 0;
    return add_pattern(name, arena, out, err);
}
