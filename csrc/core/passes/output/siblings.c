/* SPDX-License-Identifier: Apache-2.0 */
/* siblings.c -- column layers that are likely to be given one and the same input. */
#include "passes/output/siblings.h"

#include <stdlib.h>

#include "model/names.h"

/* Per layer. A set is known by its first layer, and those of a block are a list. */
typedef struct {
    int first; /* of the layer's set; -1: no column layer */
    int next;  /* first layer of the block's next set, or -1 */
    int count; /* layers of the set */
    int *members;
} member;

/* A table of heads is given no features. */
static bool
is_column(const tp_build *build, const tp_layer *layer)
{
    return layer->kind == TP_COLUMN &&
           tp_model_module(build->model, layer->module)->kind != TP_MODULE_EMBEDDING;
}

static int64_t
input_features(const tp_build *build, const tp_layer *layer)
{
    const tp_parameter *weight = tp_model_parameter(build->model, layer->weight);
    const tp_module *module = tp_model_module(build->model, layer->module);
    return weight->shape[module->kind == TP_MODULE_CONV1D ? 0 : 1];
}

/* Mark every module around a row layer. */
static void
mark_blocks(const tp_build *build, bool *is_block)
{
    for (int i = 0; i < build->plan->layer_count; i++) {
        const tp_layer *layer = &build->plan->layers[i];
        if (layer->kind != TP_ROW)
            continue;
        int at = tp_model_module(build->model, layer->module)->parent;
        while (at >= 0 && !is_block[at]) {
            is_block[at] = true;
            at = tp_model_module(build->model, at)->parent;
        }
    }
}

/* The nearest block around a module, or the member of a list: what follows it has
 * another input, and may be recomputed in a backward pass of its own. The parent where
 * there is neither. */
static int
block_of(const tp_build *build, const bool *is_block, int module)
{
    const int parent = tp_model_module(build->model, module)->parent;
    for (int at = parent; at >= 0; at = tp_model_module(build->model, at)->parent) {
        const char *leaf = tp_names_leaf(tp_model_module(build->model, at)->name);
        if (is_block[at] || tp_names_is_index(leaf))
            return at;
    }
    return parent >= 0 ? parent : module;
}

/* Put layer `index` into the set of its block that has as many inputs. */
static void
join(const tp_build *build, member *members, int *sets, int index, int block)
{
    const tp_layer *layers = build->plan->layers;
    const int64_t inputs = input_features(build, &layers[index]);
    int first = sets[block];
    while (first >= 0 && input_features(build, &layers[first]) != inputs)
        first = members[first].next;
    if (first < 0) {
        first = index;
        members[index].next = sets[block];
        sets[block] = index;
    }
    members[index].first = first;
    members[first].count++;
}

static int
write_sets(tp_plan *plan, member *members, tp_error *err)
{
    int *room =
        tp_arena_take(plan->arena, (size_t)plan->layer_count + 1, sizeof(*room), err);
    if (room == NULL)
        return -1;
    for (int i = 0; i < plan->layer_count; i++) {
        if (members[i].first != i)
            continue;
        members[i].members = room;
        room += members[i].count;
        members[i].count = 0;
    }
    for (int i = 0; i < plan->layer_count; i++) {
        if (members[i].first >= 0) {
            member *set = &members[members[i].first];
            set->members[set->count++] = i;
        }
    }
    for (int i = 0; i < plan->layer_count; i++) {
        if (members[i].first >= 0) {
            const member *set = &members[members[i].first];
            plan->layers[i].siblings = set->members;
            plan->layers[i].sibling_count = set->count;
        }
    }
    return 0;
}

int
tp_siblings_make(tp_build *build, tp_error *err)
{
    tp_plan *plan = build->plan;
    const size_t modules = (size_t)tp_model_module_count(build->model);
    member *members = calloc((size_t)plan->layer_count + 1, sizeof(*members));
    bool *is_block = calloc(modules + 1, sizeof(*is_block));
    int *sets = malloc((modules + 1) * sizeof(*sets));
    int result = -1;
    if (members == NULL || is_block == NULL || sets == NULL) {
        tp_fail_memory(err);
        goto done;
    }
    mark_blocks(build, is_block);
    for (size_t i = 0; i < modules; i++)
        sets[i] = -1;
    for (int i = 0; i < plan->layer_count; i++) {
        members[i].first = -1;
        if (is_column(build, &plan->layers[i]))
            join(build, members, sets, i,
                 block_of(build, is_block, plan->layers[i].module));
    }
    result = write_sets(plan, members, err);
done:
    free(sets);
    free(is_block);
    free(members);
    return result;
}
