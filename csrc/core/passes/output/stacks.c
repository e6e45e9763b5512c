/* SPDX-License-Identifier: Apache-2.0 */
/* stacks.c -- lists of layers, and what is where in their blocks. */
#include "passes/output/stacks.h"

#include <stdlib.h>
#include <string.h>

#include "base/text.h"
#include "model/names.h"

int
tp_stacks_parent(const tp_stacks *stacks, int module)
{
    return tp_model_module(stacks->build->model, module)->parent;
}

bool
tp_stacks_are_experts(const tp_layer *layer)
{
    return layer->kind == TP_EXPERTS || layer->kind == TP_WHOLE_EXPERTS ||
           layer->kind == TP_WHOLE_EXPERT_BLOCKS || layer->kind == TP_EXPERTS_COLUMN ||
           layer->kind == TP_EXPERTS_ROW;
}

int
tp_stacks_layer(const tp_stacks *stacks, int module)
{
    const int layer = stacks->numbered[module];
    return layer >= 0 && stacks->lists[tp_stacks_parent(stacks, layer)] ? layer : -1;
}

/* Modules come after their parents. */
static void
find_numbered(const tp_stacks *stacks)
{
    const tp_model *model = stacks->build->model;
    for (int i = 0; i < tp_model_module_count(model); i++) {
        const tp_module *module = tp_model_module(model, i);
        stacks->numbered[i] =
            module->parent < 0 ? -1 : stacks->numbered[module->parent];
        if (module->parent >= 0 && stacks->numbered[i] < 0 &&
            tp_names_is_index(tp_names_leaf(module->name)))
            stacks->numbered[i] = i;
    }
}

/* A row layer that is given its shard of the features. One that takes the shard itself
 * is given full activations, as any layer. */
static bool
is_row(const tp_layer *layer)
{
    return layer->kind == TP_ROW && !layer->split_input;
}

/* A table of heads is no column layer: it is given no features. */
static bool
is_column(const tp_stacks *stacks, const tp_layer *layer)
{
    const tp_module *module = tp_model_module(stacks->build->model, layer->module);
    return layer->kind == TP_COLUMN && module->kind != TP_MODULE_EMBEDDING;
}

static void
mark_layer(const tp_stacks *stacks, const tp_layer *layer)
{
    if (!is_row(layer) && !is_column(stacks, layer))
        return;
    for (int m = layer->module; m >= 0; m = tp_stacks_parent(stacks, m)) {
        if (is_row(layer))
            stacks->rows[m] = m == layer->module ? TP_IS_ROW : TP_HOLDS_ROW;
        else
            stacks->columns[m] = true;
    }
}

/* Whether the blocks of a layer of a stack end in what is sharded like this. */
static bool
ends_block(const tp_layer *layer)
{
    return layer->kind == TP_ROW || tp_stacks_are_experts(layer);
}

/* Whether the name of a module's class ends like this. */
static bool
has_class(const tp_stacks *stacks, int module, const char *ending)
{
    const char *name = tp_model_module(stacks->build->model, module)->class_name;
    const size_t size = strlen(name), tail = strlen(ending);
    return size >= tail && tp_text_same(name + size - tail, ending);
}

static void
drop_list(const tp_stacks *stacks, int module, int *count)
{
    if (module != tp_stacks_layer(stacks, module))
        return;
    stacks->lists[tp_stacks_parent(stacks, module)] = false;
    (*count)--;
}

/* Attention modules and what is sharded itself are blocks, which their owner calls
 * between others. */
static void
drop_lists_of_blocks(const tp_stacks *stacks, int *count)
{
    const tp_plan *plan = stacks->build->plan;
    for (int i = 0; i < plan->layer_count; i++)
        drop_list(stacks, plan->layers[i].module, count);
    for (int m = 0; m < tp_model_module_count(stacks->build->model); m++) {
        if (has_class(stacks, m, "Attention"))
            drop_list(stacks, m, count);
    }
}

static int
find_lists(const tp_stacks *stacks)
{
    const tp_plan *plan = stacks->build->plan;
    int count = 0;
    for (int i = 0; i < plan->layer_count; i++) {
        mark_layer(stacks, &plan->layers[i]);
        const int layer = stacks->numbered[plan->layers[i].module];
        /* Linear layers in a row, as in a head, are no blocks. */
        if (layer < 0 || !ends_block(&plan->layers[i]) ||
            layer == plan->layers[i].module)
            continue;
        bool *is_list = &stacks->lists[tp_stacks_parent(stacks, layer)];
        count += !*is_list;
        *is_list = true;
    }
    drop_lists_of_blocks(stacks, &count);
    return count;
}

int
tp_stacks_find(const tp_build *build, tp_stacks *stacks, int *count, tp_error *err)
{
    const size_t modules = (size_t)tp_model_module_count(build->model) + 1;
    stacks->build = build;
    stacks->numbered = calloc(modules, sizeof(*stacks->numbered));
    stacks->rows = calloc(modules, sizeof(*stacks->rows));
    stacks->columns = calloc(modules, sizeof(*stacks->columns));
    stacks->lists = calloc(modules, sizeof(*stacks->lists));
    if (stacks->numbered == NULL || stacks->rows == NULL || stacks->columns == NULL ||
        stacks->lists == NULL)
        return tp_fail_memory(err);
    find_numbered(stacks);
    *count = find_lists(stacks);
    return 0;
}

void
tp_stacks_clear(tp_stacks *stacks)
{
    free(stacks->numbered);
    free(stacks->rows);
    free(stacks->columns);
    free(stacks->lists);
}

bool
tp_stacks_is_behind_row(const tp_stacks *stacks, int module, int top)
{
    for (int m = module; m != top; m = tp_stacks_parent(stacks, m)) {
        if (stacks->rows[m] != 0 && !stacks->columns[m])
            return true;
    }
    return false;
}

/* Whether a module is a layer inside of a layer, as those that Zamba's hybrid layers
 * are made of. */
static bool
is_inner_layer(const tp_stacks *stacks, int module)
{
    return has_class(stacks, module, "DecoderLayer");
}

int
tp_stacks_block(const tp_stacks *stacks, int module)
{
    const int layer = tp_stacks_layer(stacks, module);
    int block = module;
    while (tp_stacks_parent(stacks, block) != layer &&
           !is_inner_layer(stacks, tp_stacks_parent(stacks, block)))
        block = tp_stacks_parent(stacks, block);
    return block;
}

/* Whether `module` holds several layers that are given the input of `column`. */
static bool
holds_siblings(const tp_stacks *stacks, const tp_layer *column, int module)
{
    int count = 0;
    for (int i = 0; i < column->sibling_count; i++) {
        const tp_layer *sibling = &stacks->build->plan->layers[column->siblings[i]];
        int m = sibling->module;
        while (m > module)
            m = tp_stacks_parent(stacks, m);
        count += m == module;
    }
    return count > 1;
}

int
tp_stacks_gather_input(const tp_stacks *stacks, const tp_layer *column)
{
    const int layer = tp_stacks_layer(stacks, column->module);
    int below = column->module;
    int module = tp_stacks_parent(stacks, below);
    while (module != layer && stacks->rows[module] == 0) {
        below = module;
        module = tp_stacks_parent(stacks, module);
    }
    return module == layer || holds_siblings(stacks, column, below) ? below : module;
}

bool
tp_stacks_is_norm(const tp_stacks *stacks, int module)
{
    const tp_build *build = stacks->build;
    /* GroupNorm normalizes over all tokens of a sequence. */
    if (!has_class(stacks, module, "Norm") || has_class(stacks, module, "GroupNorm") ||
        (module + 1 < tp_model_module_count(build->model) &&
         tp_stacks_parent(stacks, module + 1) == module))
        return false;
    for (int i = 0; i < build->plan->layer_count; i++) {
        if (build->plan->layers[i].module == module)
            return false;
    }
    for (int i = 0; i < build->plan->entry_count; i++) {
        const tp_parameter *is = tp_model_parameter(build->model, i);
        if (is->module == module &&
            (is->dims != 1 || build->plan->entries[i].kind != TP_REPLICATED))
            return false;
    }
    return true;
}
