/* SPDX-License-Identifier: Apache-2.0 */
/* regions.c -- where ranks work on activations that are sharded. */
#include "passes/output/regions.h"

#include <stdlib.h>

#include "base/text.h"
#include "model/adapters.h"
#include "model/names.h"
#include "rules/families.h"

/* One of each per module. */
typedef struct {
    const tp_build *build;
    bool *holds_row; /* a row layer is below it */
    bool *is_block;  /* a region begins and ends below it, and below no module of it */
} places;

static int
parent_of(const places *at, int module)
{
    return tp_model_module(at->build->model, module)->parent;
}

static const char *
leaf_of(const places *at, int module)
{
    return tp_names_leaf(tp_model_module(at->build->model, module)->name);
}

/* A table of heads is given no features, and a full output ends no region. */
static bool
is_column(const places *at, const tp_layer *layer)
{
    const tp_module *module = tp_model_module(at->build->model, layer->module);
    return layer->kind == TP_EXPERTS_COLUMN ||
           (layer->kind == TP_COLUMN && !layer->gather_output &&
            module->kind != TP_MODULE_EMBEDDING);
}

static bool
is_row(const tp_layer *layer)
{
    return layer->kind == TP_EXPERTS_ROW ||
           (layer->kind == TP_ROW && !layer->split_input);
}

static void
mark_rows(const places *at)
{
    const tp_plan *plan = at->build->plan;
    for (int i = 0; i < plan->layer_count; i++) {
        if (!is_row(&plan->layers[i]))
            continue;
        int m = parent_of(at, plan->layers[i].module);
        while (m >= 0 && !at->holds_row[m]) {
            at->holds_row[m] = true;
            m = parent_of(at, m);
        }
    }
}

static bool
has_class(const places *at, int module, const char *class_name)
{
    return tp_text_same(tp_model_module(at->build->model, module)->class_name,
                        class_name);
}

/* The nearest module around a column layer that holds a row layer, too, or the model.
 * Lists and dicts of modules have no forward. */
static int
block_of(const places *at, int column)
{
    int m = column;
    while (parent_of(at, m) >= 0) {
        m = parent_of(at, m);
        if (at->holds_row[m] && !has_class(at, m, "ModuleList") &&
            !has_class(at, m, "ModuleDict"))
            return m;
    }
    return m;
}

static bool
is_in_block(const places *at, int module)
{
    while (module >= 0 && !at->is_block[module])
        module = parent_of(at, module);
    return module >= 0;
}

static void
mark_layers(const places *at)
{
    tp_plan *plan = at->build->plan;
    for (int i = 0; i < plan->layer_count; i++) {
        plan->layers[i].opens_region = is_column(at, &plan->layers[i]);
        if (plan->layers[i].opens_region)
            at->is_block[block_of(at, plan->layers[i].module)] = true;
    }
    for (int i = 0; i < plan->layer_count; i++) {
        const tp_layer *layer = &plan->layers[i];
        plan->layers[i].closes_region = is_row(layer) && is_in_block(at, layer->module);
    }
}

/* The layer whose input an adapter drops with this module, NULL for none. */
static const tp_layer *
dropped_layer(const places *at, int module)
{
    const tp_plan *plan = at->build->plan;
    const int dropouts = parent_of(at, module);
    if (dropouts < 0 || !tp_adapters_is_dropouts(leaf_of(at, dropouts)) ||
        has_class(at, module, "Identity"))
        return NULL;
    for (int i = 0; i < plan->layer_count; i++) {
        const int layer = plan->layers[i].module;
        tp_adapted part;
        char plain[TP_LONGEST_NAME];
        if (parent_of(at, layer) != parent_of(at, dropouts))
            continue;
        tp_adapters_plain(tp_model_module(at->build->model, layer)->name, plain, &part);
        if (part == TP_ADAPTED_LAYER)
            return &plan->layers[i];
    }
    return NULL;
}

typedef bool (*choice)(const places *at, int module);

static bool
is_block(const places *at, int module)
{
    return at->is_block[module];
}

/* The input of a column layer, behind whose opening of a region an adapter drops it, or
 * what all heads of attention are given. */
static bool
is_replicated_dropout(const places *at, int module)
{
    if (parent_of(at, module) >= 0 && tp_family_drops_shared(leaf_of(at, module)))
        return is_in_block(at, module);
    const tp_layer *layer = dropped_layer(at, module);
    return layer != NULL && layer->opens_region;
}

/* The input of a row layer, behind which an adapter drops it. */
static bool
is_sharded_dropout(const places *at, int module)
{
    const tp_layer *layer = dropped_layer(at, module);
    return layer != NULL && layer->closes_region;
}

static int
choose(const places *at, choice wanted, tp_modules *out, tp_error *err)
{
    const int count = tp_model_module_count(at->build->model);
    int *items =
        tp_arena_take(at->build->plan->arena, (size_t)count, sizeof(*items), err);
    if (items == NULL)
        return -1;
    *out = (tp_modules){items, 0};
    for (int m = 0; m < count; m++) {
        if (wanted(at, m))
            items[out->count++] = m;
    }
    return 0;
}

int
tp_regions_make(tp_build *build, tp_error *err)
{
    const size_t modules = (size_t)tp_model_module_count(build->model) + 1;
    tp_regions *regions = &build->plan->regions;
    places at = {build, calloc(modules, sizeof(bool)), calloc(modules, sizeof(bool))};
    int result = -1;
    if (at.holds_row == NULL || at.is_block == NULL) {
        tp_fail_memory(err);
        goto done;
    }
    mark_rows(&at);
    mark_layers(&at);
    if (choose(&at, is_block, &regions->blocks, err) < 0 ||
        choose(&at, is_replicated_dropout, &regions->replicated_dropouts, err) < 0 ||
        choose(&at, is_sharded_dropout, &regions->sharded_dropouts, err) < 0)
        goto done;
    result = 0;
done:
    free(at.holds_row);
    free(at.is_block);
    return result;
}
