/* SPDX-License-Identifier: Apache-2.0 */
/* per_head.c -- tables and vectors with a value for each attention head. */
#include "passes/settle/per_head.h"

#include <stdlib.h>
#include <string.h>

#include "model/names.h"

static const tp_spec table = {.partition = TP_PARTITION_COLUMN, .dim = 1};
static const tp_spec vector = {.partition = TP_PARTITION_COLUMN, .dim = 0};

/* What the embeddings are called that hold them. */
static const char *const tables[] = {"relative_attention_bias"};

/* What the parameters are called that hold per-head vectors. */
static const char *const vectors[] = {"sinks"};

static bool
is_free(const tp_build *build, int parameter)
{
    return build->choices[parameter].spec == NULL &&
           tp_model_parameter(build->model, parameter)->tied_to < 0 &&
           build->next_name[parameter] < 0;
}

static bool
is_table(const tp_build *build, int parameter)
{
    const tp_parameter *at = tp_model_parameter(build->model, parameter);
    const tp_module *module = tp_model_module(build->model, at->module);
    if (module->kind != TP_MODULE_EMBEDDING || module->parent < 0 || at->dims != 2 ||
        at->shape[0] == 0 || strcmp(at->leaf, "weight") != 0 ||
        !is_free(build, parameter))
        return false;
    const char *leaf = tp_names_leaf(module->name);
    for (size_t i = 0; i < sizeof(tables) / sizeof(tables[0]); i++) {
        if (strcmp(leaf, tables[i]) == 0)
            return true;
    }
    return false;
}

static bool
is_vector(const tp_build *build, int parameter)
{
    const tp_parameter *at = tp_model_parameter(build->model, parameter);
    const tp_geometry *geometry = tp_geometries_at(build->geometries, at->module);
    if (geometry == NULL || at->dims != 1 || at->shape[0] != geometry->heads.query ||
        !is_free(build, parameter) || !build->options->defaults)
        return false;
    for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++) {
        if (strcmp(at->leaf, vectors[i]) == 0)
            return true;
    }
    return false;
}

/* For each module a weight whose columns are its heads, or -1; `named`: because of the
 * names of its layers. */
static void
find_columns(const tp_build *build, bool named, int *weights)
{
    for (int i = 0; i < tp_model_module_count(build->model); i++)
        weights[i] = -1;
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const tp_decision *decision = &build->decisions[i];
        const tp_source source = build->choices[i].source;
        if (decision->kind == TP_COLUMN && decision->attention >= 0 &&
            (!named || source == TP_FROM_FAMILY || source == TP_FROM_HEURISTIC))
            weights[decision->attention] = i;
    }
}

/* Along the last dimension, which is that of the heads. */
static int
shard_heads(tp_build *build, int parameter, int weight, tp_error *err)
{
    const tp_parameter *at = tp_model_parameter(build->model, parameter);
    const int attention = build->decisions[weight].attention;
    const tp_heads heads = tp_geometries_at(build->geometries, attention)->heads;
    const int dim = at->dims - 1;
    if (at->shape[dim] != heads.query)
        return 0;
    const tp_piece piece = {heads.query, 1, TP_PIECE_QUERY};
    tp_decision decision = TP_NO_DECISION;
    decision.kind = TP_COLUMN;
    decision.dim = dim;
    decision.outer = dim == 0 ? 1 : at->shape[0];
    decision.attention = attention;
    if (tp_layout_cache_get(build->layouts, &piece, 1, heads, &decision.layout, err) <
        0)
        return -1;
    build->decisions[parameter] = decision;
    build->choices[parameter] = (tp_choice){
        dim == 0 ? &vector : &table, build->choices[weight].source,
        dim == 0 ? "per-head vector" : "per-head table", TP_REASON_PER_HEAD};
    return 0;
}

int
tp_per_head_settle(tp_build *build, tp_error *err)
{
    const size_t modules = (size_t)tp_model_module_count(build->model) + 1;
    int *weights = malloc(modules * sizeof(*weights));
    if (weights == NULL)
        return tp_fail_memory(err);
    find_columns(build, true, weights);
    int result = 0;
    for (int i = 0; result == 0 && i < tp_model_parameter_count(build->model); i++) {
        if (!is_table(build, i))
            continue;
        const int module = tp_model_parameter(build->model, i)->module;
        const int weight = weights[tp_model_module(build->model, module)->parent];
        if (weight >= 0)
            result = shard_heads(build, i, weight, err);
    }
    find_columns(build, false, weights);
    for (int i = 0; result == 0 && i < tp_model_parameter_count(build->model); i++) {
        const int weight = weights[tp_model_parameter(build->model, i)->module];
        if (weight >= 0 && is_vector(build, i))
            result = shard_heads(build, i, weight, err);
    }
    free(weights);
    return result;
}
