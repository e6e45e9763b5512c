/* SPDX-License-Identifier: Apache-2.0 */
/* layers.c -- the modules of a plan whose forward changes. */
#include "passes/output/layers.h"

#include <stdlib.h>

#include "passes/output/head_inputs.h"
#include "passes/output/rope.h"
#include "passes/settle/experts.h"
#include "passes/settle/norms.h"
#include "passes/settle/whole_experts.h"

/* A linear or embedding module whose weight is sharded. */
static bool
find_sharded(const tp_build *build, int module, tp_layer *out)
{
    if (!tp_module_is_layer(tp_model_module(build->model, module)))
        return false;
    const int weight = tp_model_find_parameter(build->model, module, "weight");
    if (weight < 0 || build->decisions[weight].layout == NULL)
        return false;
    const tp_decision *decision = &build->decisions[weight];
    out->kind = decision->kind;
    out->weight = weight;
    out->bias = tp_model_find_parameter(build->model, module, "bias");
    out->gather_output = decision->gather_output;
    out->split_input = decision->split_input;
    out->is_large = build->choices[weight].reason == TP_REASON_LARGE;
    return true;
}

static int
experts_layer(const tp_build *build, int module, tp_layer *out, tp_error *err)
{
    const int count = tp_experts_divided(build, module, NULL);
    int *divided =
        tp_arena_take(build->plan->arena, (size_t)count + 1, sizeof(*divided), err);
    if (divided == NULL)
        return -1;
    out->weight = tp_whole_experts_first(build, module);
    const bool blocks =
        tp_model_module(build->model, module)->kind == TP_MODULE_EXPERT_BLOCKS;
    if (out->weight >= 0)
        out->kind = blocks ? TP_WHOLE_EXPERT_BLOCKS : TP_WHOLE_EXPERTS;
    else
        out->kind = TP_EXPERTS;
    out->divided_count = tp_experts_divided(build, module, divided);
    out->divided = divided;
    return 0;
}

/* 1 where the module's forward changes, 0 where not, -1 for an error. */
static int
find_layer(const tp_build *build, int module, tp_layer *out, tp_error *err)
{
    if (find_sharded(build, module, out))
        return 1;
    if (build->experts[module])
        return experts_layer(build, module, out, err) < 0 ? -1 : 1;
    if (tp_experts_share(build, module)) {
        out->kind = TP_SHARE;
        return 1;
    }
    out->weight = tp_experts_side(build, module);
    if (out->weight >= 0) {
        out->kind = build->decisions[out->weight].kind == TP_COLUMN ? TP_EXPERTS_COLUMN
                                                                    : TP_EXPERTS_ROW;
        return 1;
    }
    out->weight = tp_norms_follow(build, module);
    if (out->weight >= 0) {
        out->kind = TP_NORM;
        return 1;
    }
    return tp_rope_layer(build, module, out, err);
}

static int
find_layers(tp_build *build, const tp_layout **heads, tp_error *err)
{
    tp_plan *plan = build->plan;
    if (tp_head_inputs_find(build, heads, err) < 0)
        return -1;
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        tp_layer layer = {.module = i, .weight = -1, .bias = -1};
        int found = find_layer(build, i, &layer, err);
        if (found < 0)
            return -1;
        if (!found && heads[i] != NULL) {
            layer.kind = TP_HEADS;
            layer.heads = heads[i];
            found = 1;
        }
        if (found)
            plan->layers[plan->layer_count++] = layer;
    }
    return 0;
}

int
tp_layers_make(tp_build *build, tp_error *err)
{
    tp_plan *plan = build->plan;
    const size_t count = (size_t)tp_model_module_count(build->model) + 1;
    plan->layers = tp_arena_take(plan->arena, count, sizeof(*plan->layers), err);
    if (plan->layers == NULL)
        return -1;
    const tp_layout **heads = calloc(count, sizeof(*heads));
    if (heads == NULL)
        return tp_fail_memory(err);
    const int result = find_layers(build, heads, err);
    free(heads);
    return result;
}
