/* SPDX-License-Identifier: Apache-2.0 */
/* factors.c -- factors of adapters, sharded as their layers. */
#include "passes/choose/factors.h"

#include <string.h>

#include "model/adapters.h"

typedef struct {
    tp_build *build;
    tp_text room;
} search;

static int
weight_of(const tp_build *build, int module)
{
    return tp_model_find_parameter(build->model, module, "weight");
}

/* The module whose name has `other` in the place of `list` and the name of an adapter.
 * -1: none. */
static int
find_instead(search *with, const char *name, const char *list, const char *other)
{
    const char *at = strstr(name, list);
    if (at == NULL)
        return -1;
    const char *adapter = at + strlen(list);
    with->room.size = 0;
    tp_text_add(&with->room, "%.*s%s%s", (int)(at - name), name, other,
                adapter + strcspn(adapter, "."));
    if (with->room.failed)
        return -1;
    return tp_model_find_module(with->build->model, with->room.data, with->room.size);
}

/* The specification of a layer for a factor beside it, a linear layer. */
static tp_spec
for_factor(const tp_spec *spec, tp_module_kind kind)
{
    tp_spec own = *spec;
    if (kind != TP_MODULE_CONV1D)
        return own;
    if (own.dim == 0 || own.dim == 1)
        own.dim = 1 - own.dim;
    if (own.shape.dims == 2) {
        own.shape.sizes[0] = spec->shape.sizes[1];
        own.shape.sizes[1] = spec->shape.sizes[0];
    }
    return own;
}

static int
follow_layer(search *with, int factor, int layer, tp_partition side, tp_error *err)
{
    tp_build *build = with->build;
    const int own = weight_of(build, factor);
    const int weight = layer < 0 ? -1 : weight_of(build, layer);
    const tp_module_kind kind =
        layer < 0 ? TP_MODULE_OTHER : tp_model_module(build->model, layer)->kind;
    if (own < 0)
        return 0;
    const tp_choice choice =
        weight < 0 ? (tp_choice)TP_NO_CHOICE : build->choices[weight];
    build->choices[own] = (tp_choice)TP_NO_CHOICE;
    if (kind == TP_MODULE_EMBEDDING || choice.spec == NULL ||
        choice.spec->partition != side)
        return 0;
    tp_spec *spec = tp_arena_take(build->plan->arena, 1, sizeof(*spec), err);
    if (spec == NULL)
        return -1;
    *spec = for_factor(choice.spec, kind);
    build->choices[own] = choice;
    build->choices[own].spec = spec;
    build->attentions[factor] = build->attentions[layer];
    return 0;
}

/* A copy is sharded as the original, once that is known for good. */
static void
clear(tp_build *build, int copy)
{
    for (int i = tp_model_first_parameter(build->model, copy); i >= 0;
         i = tp_model_next_parameter(build->model, i))
        build->choices[i] = (tp_choice)TP_NO_CHOICE;
}

static int
follow(search *with, int module, tp_error *err)
{
    char plain[TP_LONGEST_NAME];
    tp_adapted part;
    const char *name = tp_model_module(with->build->model, module)->name;
    tp_adapters_plain(name, plain, &part);
    if (part == TP_ADAPTED_DOWN || part == TP_ADAPTED_UP) {
        const bool down = part == TP_ADAPTED_DOWN;
        const int layer =
            find_instead(with, name, down ? ".lora_A." : ".lora_B.", ".base_layer");
        return follow_layer(with, module, layer,
                            down ? TP_PARTITION_ROW : TP_PARTITION_COLUMN, err);
    }
    if (tp_adapters_is_copy(name))
        clear(with->build, module);
    return 0;
}

int
tp_factors_choose(tp_build *build, tp_error *err)
{
    const tp_model *model = build->model;
    const int count = tp_model_module_count(model);
    search with = {.build = build, .room = TP_NO_TEXT};
    int result = 0;
    for (int i = 0; result >= 0 && i < count; i++)
        result = follow(&with, i, err);
    if (result >= 0 && with.room.failed)
        result = tp_fail_memory(err);
    tp_text_free(&with.room);
    return result;
}
