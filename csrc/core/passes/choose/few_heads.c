/* SPDX-License-Identifier: Apache-2.0 */
/* few_heads.c -- attention with fewer heads than ranks, in a model that has more. */
#include "passes/choose/few_heads.h"

#include <stdlib.h>
#include <string.h>

#include "base/map.h"
#include "model/names.h"
#include "passes/choose/fallback.h"
#include "passes/resolve/raw.h"
#include "passes/resolve/resolve.h"

/* A TP size at which more than 1/MOST_PART of the parameters stays replicated for this
 * reason is refused. */
enum { MOST_PART = 10 };

/* What is found out about an attention module. */
enum { HAS_ROW = 1, IS_REFUSED = 2, STAYS = HAS_ROW | IS_REFUSED };

/* The attention module whose heads are too few and which a rule of transformers shards
 * with the parameter, or -1. */
static int
find_attention(const tp_build *build, int parameter)
{
    const tp_choice *choice = &build->choices[parameter];
    const int module = tp_model_parameter(build->model, parameter)->module;
    if (choice->spec == NULL || choice->source != TP_FROM_HF ||
        choice->spec->partition == TP_PARTITION_SKIP ||
        tp_raw_is(build->model, parameter) ||
        tp_model_module(build->model, module)->kind == TP_MODULE_EMBEDDING)
        return -1;
    const int attention = tp_geometries_find(build->geometries, module);
    const tp_geometry *geometry = tp_geometries_at(build->geometries, attention);
    return geometry != NULL && geometry->heads.query < build->options->ranks ? attention
                                                                             : -1;
}

/* What a rule comes to is found out by trying. */
static int
find_refused(tp_build *build, char *found, tp_error *err)
{
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const int attention = find_attention(build, i);
        if (attention < 0)
            continue;
        if (build->choices[i].spec->partition == TP_PARTITION_ROW)
            found[attention] |= HAS_ROW;
        const int result = tp_resolve_parameter(build, i, err);
        build->decisions[i] = (tp_decision)TP_NO_DECISION;
        if (result == 0)
            continue;
        if (err->code != TP_VALUE)
            return -1;
        tp_error_clear(err);
        found[attention] |= IS_REFUSED;
    }
    return 0;
}

/* Keep the modules in which features are made of heads and heads of features again, so
 * that nothing outside of them is given a shard, and mark what is inside of them.
 * Parents come before their children. */
static bool
mark_inside(const tp_build *build, char *found)
{
    bool any = false;
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        const int parent = tp_model_module(build->model, i)->parent;
        found[i] = found[i] == STAYS || (parent >= 0 && found[parent]) ? STAYS : 0;
        any |= found[i] != 0;
    }
    return any;
}

/* Whether the model is sharded all the same. */
static bool
is_small(const tp_build *build, const char *found)
{
    int64_t inside = 0;
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const tp_parameter *at = tp_model_parameter(build->model, i);
        if (at->tied_to < 0 && found[at->module])
            inside += tp_parameter_elements(at);
    }
    return inside <= tp_model_elements(build->model) / MOST_PART;
}

static int
add_message(tp_build *build, int module, tp_map *said, tp_error *err)
{
    const tp_module *at = tp_model_module(build->model, module);
    const tp_heads heads = tp_geometries_at(build->geometries, module)->heads;
    char *starred = tp_names_starred(build->plan->arena, at->name, err);
    if (starred == NULL)
        return -1;
    if (tp_map_find(said, starred, strlen(starred)) >= 0)
        return 0;
    if (tp_map_add(said, starred, 0, err) < 0)
        return -1;
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text,
                "%s stays replicated: it has %lld query and %lld key/value heads, and "
                "cannot be sharded over %d ranks",
                starred, (long long)heads.query, (long long)heads.key,
                build->options->ranks);
    return tp_build_message(build, &text, err);
}

static int
replicate(tp_build *build, const char *found, tp_error *err)
{
    tp_map *said = NULL;
    int result = tp_map_new(4, &said, err);
    for (int i = 0; result == 0 && i < tp_model_module_count(build->model); i++) {
        const int parent = tp_model_module(build->model, i)->parent;
        if (found[i] && (parent < 0 || !found[parent]))
            result = add_message(build, i, said, err);
    }
    for (int i = 0; result == 0 && i < tp_model_parameter_count(build->model); i++) {
        if (found[tp_model_parameter(build->model, i)->module])
            tp_fallback_replicate_tensor(build, i);
    }
    tp_map_free(said);
    return result;
}

int
tp_few_heads_replicate(tp_build *build, tp_error *err)
{
    if (!tp_rules_have(build->rules, TP_FROM_HF))
        return 0;
    const size_t modules = (size_t)tp_model_module_count(build->model);
    char *found = calloc(modules + 1, sizeof(*found));
    if (found == NULL)
        return tp_fail_memory(err);
    int result = find_refused(build, found, err);
    if (result == 0 && mark_inside(build, found) && is_small(build, found))
        result = replicate(build, found, err);
    free(found);
    return result;
}
