/* SPDX-License-Identifier: Apache-2.0 */
/* large_layers.c -- large layers that nothing else shards, individually sharded. */
#include "passes/choose/large_layers.h"

#include <stdlib.h>
#include <string.h>

#include "base/map.h"
#include "model/adapters.h"
#include "model/names.h"
#include "passes/choose/choose.h"
#include "passes/choose/family_blocks.h"
#include "rules/families.h"

/* Layers called alike that hold less than this part of the parameters stay replicated.
 */
enum { LEAST_PART = 64 };

static const char label[] = "individually sharded";
static const tp_spec column_gathered = {
    .partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true};
static const tp_spec row_split = {
    .partition = TP_PARTITION_ROW, .dim = -1, .split_input = true};
static const tp_spec embedding_columns = {.partition = TP_PARTITION_COLUMN, .dim = -1};

/* Layers whose names differ in indices only. */
typedef struct {
    const tp_build *build;
    tp_map *names;     /* to indices of `elements` */
    int64_t *elements; /* of the weights of each group */
    int *groups;       /* one per module: its group, or -1 */
    int count;
} search;

/* Whether a rule speaks of the module, or of one around it. */
static bool
is_ruled(const tp_build *build, int module)
{
    for (int i = module; i >= 0; i = tp_model_module(build->model, i)->parent) {
        if (build->module_rules[i] >= 0)
            return true;
    }
    return false;
}

/* What a layer with such a weight may be sharded by: in the dimension that makes for
 * fewer elements on the way, each of which is gathered once and summed once. NULL: it
 * has no features for every rank. */
static const tp_spec *
spec_of(const tp_build *build, int module, const tp_parameter *weight)
{
    const tp_module_kind kind = tp_model_module(build->model, module)->kind;
    const int first = kind == TP_MODULE_LINEAR ? 0 : 1;
    const int64_t out = weight->shape[first], in = weight->shape[1 - first];
    const bool row = kind != TP_MODULE_EMBEDDING && in > out;
    if ((row ? in : out) < build->options->ranks || in == 0 || out == 0)
        return NULL;
    return kind == TP_MODULE_EMBEDDING ? &embedding_columns
           : row                       ? &row_split
                                       : &column_gathered;
}

/* The weight of a layer that nothing shards, or -1. */
static int
find_weight(const tp_build *build, int module)
{
    if (!tp_module_is_layer(tp_model_module(build->model, module)))
        return -1;
    const int weight = tp_model_find_parameter(build->model, module, "weight");
    const tp_parameter *at =
        weight < 0 ? NULL : tp_model_parameter(build->model, weight);
    char plain[TP_LONGEST_NAME];
    tp_adapted part;
    tp_adapters_plain(tp_model_module(build->model, module)->name, plain, &part);
    if (part == TP_ADAPTED_DOWN || part == TP_ADAPTED_UP) /* follow their layer */
        return -1;
    if (at == NULL || at->dims != 2 || tp_choose_is_taken(build, weight) ||
        build->next_name[tp_build_first(build, weight)] >= 0 ||
        is_ruled(build, module) || spec_of(build, module, at) == NULL)
        return -1;
    return weight;
}

/* Whether the options let layers of this name be large; all that they do not name are
 * none then. */
static bool
may_be_large(const tp_plan_options *options, const char *starred)
{
    if (options->large_names == NULL)
        return true;
    for (int i = 0; i < options->large_name_count; i++)
        if (strcmp(options->large_names[i], starred) == 0)
            return true;
    return false;
}

/* Add the layer to those called alike. */
static int
join(search *with, int module, int weight, tp_error *err)
{
    const tp_build *build = with->build;
    const char *name = tp_model_module(build->model, module)->name;
    char *starred = tp_names_starred(build->plan->arena, name, err);
    if (starred == NULL)
        return -1;
    if (!may_be_large(build->options, starred))
        return 0;
    int group = tp_map_find(with->names, starred, strlen(starred));
    if (group < 0) {
        group = with->count++;
        if (tp_map_add(with->names, starred, group, err) < 0)
            return -1;
    }
    with->groups[module] = group;
    with->elements[group] +=
        tp_parameter_elements(tp_model_parameter(build->model, weight));
    return 0;
}

static int
find_groups(search *with, tp_error *err)
{
    const int count = tp_model_module_count(with->build->model);
    with->elements = calloc((size_t)count + 1, sizeof(*with->elements));
    with->groups = calloc((size_t)count + 1, sizeof(*with->groups));
    if (with->elements == NULL || with->groups == NULL)
        return tp_fail_memory(err);
    if (tp_map_new((size_t)count, &with->names, err) < 0)
        return -1;
    for (int i = 0; i < count; i++) {
        with->groups[i] = -1;
        const int weight = find_weight(with->build, i);
        if (weight >= 0 && join(with, i, weight, err) < 0)
            return -1;
    }
    return 0;
}

/* Whether there was something to choose. */
static bool
choose(const search *with, tp_source source)
{
    bool any = false;
    const tp_build *build = with->build;
    const bool named = build->options->large_names != NULL;
    const int64_t least = named ? 0 : tp_model_elements(build->model) / LEAST_PART;
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        const int group = with->groups[i];
        if (group < 0 || with->elements[group] < least)
            continue;
        const int weight = tp_model_find_parameter(build->model, i, "weight");
        const tp_parameter *at = tp_model_parameter(build->model, weight);
        build->choices[weight] =
            (tp_choice){spec_of(build, i, at), source, label, TP_REASON_LARGE};
        any = true;
    }
    return any;
}

/* Whether a rule or a pair shards anything. */
static bool
is_known(const tp_build *build)
{
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const tp_choice *choice = &build->choices[i];
        if (choice->spec != NULL && choice->spec->partition != TP_PARTITION_SKIP &&
            choice->source != TP_FROM_DEFAULT)
            return true;
    }
    return false;
}

/* The plan of a model of unknown names is right, but not as fast as it could be. */
static int
advise(tp_build *build, tp_error *err)
{
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text,
                "%s has no layers whose names are known, so its large layers are "
                "individually sharded, with full activations between them; for less "
                "communication list pairs of column and row layers in "
                "tensor_parallel.partition_config",
                tp_model_module(build->model, 0)->class_name);
    return tp_build_message(build, &text, err);
}

int
tp_large_layers_choose(tp_build *build, tp_error *err)
{
    const char *type = tp_model_get_facts(build->model)->model_type;
    const bool tried = tp_family_is_tried(type);
    if (!build->options->large_layers || !tp_family_may_choose(build))
        return 0;
    const bool known = tried || is_known(build);
    search with = {.build = build};
    int result = find_groups(&with, err);
    if (result == 0 && choose(&with, tried ? TP_FROM_FAMILY : TP_FROM_HEURISTIC) &&
        !known)
        result = advise(build, err);
    tp_map_free(with.names);
    free(with.elements);
    free(with.groups);
    return result;
}
