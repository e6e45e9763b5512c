/* SPDX-License-Identifier: Apache-2.0 */
/* defaults.c -- what happens where no rule speaks. */
#include "passes/choose/defaults.h"

#include <stdlib.h>
#include <string.h>

#include "model/adapters.h"
#include "model/names.h"
#include "passes/choose/choose.h"
#include "passes/resolve/resolve.h"
#include "passes/settle/norms.h"
#include "rules/families.h"

static const tp_spec vocabulary = {.partition = TP_PARTITION_ROW, .dim = -1};
static const tp_spec hidden = {.partition = TP_PARTITION_COLUMN, .dim = -1};
static const tp_spec head = {
    .partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true};
static const tp_spec summed = {
    .partition = TP_PARTITION_SKIP, .dim = -1, .sum_gradient = true};

static void
choose(tp_build *build, int parameter, const tp_spec *spec, const char *rule)
{
    build->choices[parameter] =
        (tp_choice){spec, TP_FROM_DEFAULT, rule, TP_REASON_DEFAULT};
}

/* Whether nothing else says what happens to embeddings and heads. */
static bool
is_asked(const tp_build *build)
{
    const tp_rules *rules = build->rules;
    const char *type = tp_model_get_facts(build->model)->model_type;
    return tp_rules_have(rules, TP_FROM_CONFIG) ||
           tp_rules_have(rules, TP_FROM_PRESET) ||
           (tp_rules_count(rules) == 0 && build->options->families &&
            (build->paired > 0 || tp_family_is_tried(type)));
}

/* The layer that is `module`, or that adapters were put around there; -1 for none. */
static int
adapted_layer(const tp_build *build, int module)
{
    if (module < 0 || tp_module_is_layer(tp_model_module(build->model, module)))
        return module;
    for (int i = module + 1; i < tp_model_module_count(build->model); i++) {
        const tp_module *at = tp_model_module(build->model, i);
        char plain[TP_LONGEST_NAME];
        tp_adapted part;
        tp_adapters_plain(at->name, plain, &part);
        if (at->parent == module && part == TP_ADAPTED_LAYER)
            return i;
    }
    return -1;
}

static bool
is_head(const tp_build *build, int module, int output_head)
{
    const tp_module *at = tp_model_module(build->model, module);
    if (at->kind != TP_MODULE_LINEAR)
        return false;
    if (module == output_head)
        return true;
    char room[TP_LONGEST_NAME];
    tp_adapted part;
    const char *leaf = tp_names_leaf(tp_adapters_plain(at->name, room, &part));
    const tp_plan_options *options = build->options;
    for (int i = 0; i < options->head_pattern_count; i++) {
        if (strstr(leaf, options->head_patterns[i]) != NULL)
            return true;
    }
    return false;
}

/* The weight that a default may shard along `dim`, or -1. */
static int
find_weight(const tp_build *build, int module, int dim)
{
    const int weight = tp_model_find_parameter(build->model, module, "weight");
    if (weight < 0)
        return -1;
    const tp_parameter *at = tp_model_parameter(build->model, weight);
    const bool fits = at->dims == 2 && at->shape[dim] >= build->options->ranks &&
                      at->shape[1 - dim] > 0;
    return fits ? weight : -1;
}

static bool
is_tied(const tp_build *build, int index)
{
    return build->next_name[tp_build_first(build, index)] >= 0;
}

static void
choose_embedding(tp_build *build)
{
    const int module =
        adapted_layer(build, tp_model_get_facts(build->model)->input_embedding);
    if (module < 0 ||
        tp_model_module(build->model, module)->kind != TP_MODULE_EMBEDDING)
        return;
    int weight = tp_model_find_parameter(build->model, module, "weight");
    if (weight < 0 || tp_choose_is_taken(build, weight))
        return;
    /* A head that shares the tensor is sharded along the vocabulary. */
    const int dim = is_tied(build, weight) ? 0 : build->options->embedding_dim;
    weight = find_weight(build, module, dim);
    if (weight >= 0)
        choose(build, weight, dim == 0 ? &vocabulary : &hidden, "input embedding");
}

/* A head that shares the embedding's tensor is taken by then, and follows it. */
int
tp_defaults_choose(tp_build *build, tp_error *err)
{
    (void)err;
    if (!build->options->defaults || !is_asked(build))
        return 0;
    choose_embedding(build);
    const int count = tp_model_module_count(build->model);
    const int output_head =
        adapted_layer(build, tp_model_get_facts(build->model)->output_head);
    for (int i = 0; i < count; i++) {
        const int weight =
            is_head(build, i, output_head) ? find_weight(build, i, 0) : -1;
        if (weight >= 0 && !tp_choose_is_taken(build, weight))
            choose(build, weight, &head, "output head");
    }
    return 0;
}

/* Whether `index` is the 1-D weight or bias of a norm over one head. */
static bool
is_head_norm(const tp_build *build, int index, const char *sharded)
{
    const tp_parameter *at = tp_model_parameter(build->model, index);
    const tp_module *module = tp_model_module(build->model, at->module);
    const int parent = tp_adapters_parent(build->model, at->module);
    char room[TP_LONGEST_NAME];
    tp_adapted part;
    if (at->dims != 1 || parent < 0 || !sharded[parent] ||
        !tp_norms_is_head(tp_names_leaf(tp_adapters_plain(module->name, room, &part))))
        return false;
    const tp_geometry *geometry = tp_geometries_at(build->geometries, parent);
    return geometry != NULL && at->shape[0] == geometry->head_size &&
           (strcmp(at->leaf, "weight") == 0 || strcmp(at->leaf, "bias") == 0);
}

/* What modules between a column and a row layer are called that work on each feature.
 */
static const char *const activations[] = {"act", "act_fn", "activation",
                                          "activation_fn"};

/* Whether `index` is one scalar that an activation between two sharded layers has for
 * all features. */
static bool
is_activation(const tp_build *build, int index, const char *sharded)
{
    const tp_parameter *at = tp_model_parameter(build->model, index);
    const tp_module *module = tp_model_module(build->model, at->module);
    if (module->parent < 0 || !sharded[module->parent] || tp_module_is_layer(module))
        return false;
    for (int i = 0; i < at->dims; i++) {
        if (at->shape[i] != 1)
            return false;
    }
    for (size_t i = 0; i < sizeof(activations) / sizeof(activations[0]); i++) {
        if (strcmp(tp_names_leaf(module->name), activations[i]) == 0)
            return true;
    }
    return false;
}

int
tp_defaults_inside(tp_build *build, tp_error *err)
{
    if (!build->options->defaults)
        return 0;
    const int count = tp_model_parameter_count(build->model);
    const size_t modules = (size_t)tp_model_module_count(build->model);
    char *sharded = calloc(modules + 1, sizeof(*sharded)); /* has a column child */
    if (sharded == NULL)
        return tp_fail_memory(err);
    for (int i = 0; i < count; i++) {
        const int module = tp_model_parameter(build->model, i)->module;
        const int parent = tp_adapters_parent(build->model, module);
        const tp_decision *decision = &build->decisions[i];
        if (parent >= 0 && decision->kind == TP_COLUMN && !decision->gather_output)
            sharded[parent] = 1;
    }
    int result = 0;
    for (int i = 0; i < count && result == 0; i++) {
        if (build->choices[i].spec != NULL)
            continue;
        if (is_head_norm(build, i, sharded))
            choose(build, i, &summed, "norm inside a sharded block");
        else if (is_activation(build, i, sharded))
            choose(build, i, &summed, "activation inside a sharded block");
        else
            continue;
        result = tp_resolve_parameter(build, i, err);
    }
    free(sharded);
    return result;
}
