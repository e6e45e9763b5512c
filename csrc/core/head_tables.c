/* SPDX-License-Identifier: Apache-2.0 */
/* head_tables.c -- tables with a column for each head, inside of attention. */
#include "head_tables.h"

#include <stdlib.h>
#include <string.h>

#include "names.h"

static const tp_spec columns = {.cut = TP_CUT_COLUMN, .dim = 1};

/* What the embeddings are called that hold them. */
static const char *const tables[] = {"relative_attention_bias"};

static bool
is_table(const tp_build *build, int parameter)
{
    const tp_parameter *at = tp_model_parameter(build->model, parameter);
    const tp_module *module = tp_model_module(build->model, at->module);
    if (module->kind != TP_MODULE_EMBEDDING || module->parent < 0 || at->dims != 2 ||
        at->shape[0] == 0 || strcmp(at->leaf, "weight") != 0 ||
        build->choices[parameter].spec != NULL || at->tied_to >= 0 ||
        build->next_name[parameter] >= 0)
        return false;
    const char *leaf = tp_names_leaf(module->name);
    for (size_t i = 0; i < sizeof(tables) / sizeof(tables[0]); i++) {
        if (strcmp(leaf, tables[i]) == 0)
            return true;
    }
    return false;
}

/* For each module a weight whose columns are its heads by their names, or -1. */
static void
find_columns(const tp_build *build, int *weights)
{
    for (int i = 0; i < tp_model_module_count(build->model); i++)
        weights[i] = -1;
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const tp_decision *decision = &build->decisions[i];
        const tp_source source = build->choices[i].source;
        if (decision->kind == TP_COLUMN && decision->attention >= 0 &&
            (source == TP_FROM_FAMILY || source == TP_FROM_GUESS))
            weights[decision->attention] = i;
    }
}

static int
cut_table(tp_build *build, int parameter, int weight, tp_error *err)
{
    const tp_parameter *at = tp_model_parameter(build->model, parameter);
    const int attention = build->decisions[weight].attention;
    const tp_heads heads = tp_geometries_at(build->geometries, attention)->heads;
    if (at->shape[1] != heads.query)
        return 0;
    const tp_piece piece = {heads.query, 1, TP_PIECE_QUERY};
    tp_decision decision = TP_NO_DECISION;
    decision.kind = TP_COLUMN;
    decision.dim = 1;
    decision.outer = at->shape[0];
    decision.attention = attention;
    if (tp_layouts_get(build->layouts, &piece, 1, heads, &decision.layout, err) < 0)
        return -1;
    build->decisions[parameter] = decision;
    build->choices[parameter] =
        (tp_choice){&columns, build->choices[weight].source, "a column for each head"};
    return 0;
}

int
tp_head_tables_settle(tp_build *build, tp_error *err)
{
    const size_t modules = (size_t)tp_model_module_count(build->model) + 1;
    int *weights = malloc(modules * sizeof(*weights));
    if (weights == NULL)
        return tp_fail_memory(err);
    find_columns(build, weights);
    int result = 0;
    for (int i = 0; result == 0 && i < tp_model_parameter_count(build->model); i++) {
        if (!is_table(build, i))
            continue;
        const int module = tp_model_parameter(build->model, i)->module;
        const int weight = weights[tp_model_module(build->model, module)->parent];
        if (weight >= 0)
            result = cut_table(build, i, weight, err);
    }
    free(weights);
    return result;
}
