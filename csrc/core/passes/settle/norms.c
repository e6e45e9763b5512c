/* SPDX-License-Identifier: Apache-2.0 */
/* norms.c -- norms over features that are sharded. */
#include "passes/settle/norms.h"

#include <string.h>

#include "model/adapters.h"
#include "model/names.h"

/* What a norm works on: what a projection gives, or what the last layer takes. */
typedef enum { OF_QUERIES, OF_KEYS, OF_INPUT } subject;

static const struct {
    const char *leaf;
    subject of;
} names[] = {
    {"q_norm", OF_QUERIES},        {"q_layernorm", OF_QUERIES},
    {"query_norm", OF_QUERIES},    {"query_layernorm", OF_QUERIES},
    {"q_ln", OF_QUERIES},          {"k_norm", OF_KEYS},
    {"k_layernorm", OF_KEYS},      {"key_norm", OF_KEYS},
    {"key_layernorm", OF_KEYS},    {"k_ln", OF_KEYS},
    {"attn_sub_norm", OF_INPUT},   {"ffn_sub_norm", OF_INPUT},
    {"inner_attn_ln", OF_INPUT},   {"ffn_layernorm", OF_INPUT},
    {"inner_layernorm", OF_INPUT},
};

enum { NAME_COUNT = sizeof(names) / sizeof(names[0]) };

static int
find_name(const char *leaf)
{
    for (int i = 0; i < NAME_COUNT; i++) {
        if (strcmp(names[i].leaf, leaf) == 0)
            return i;
    }
    return -1;
}

bool
tp_norms_is_head(const char *leaf)
{
    const int name = find_name(leaf);
    return name >= 0 && names[name].of != OF_INPUT;
}

/* Whether the sharded weight of `module` gives or takes `size` features for such a
 * norm. */
static bool
fits(const tp_build *build, int module, subject of, int64_t size)
{
    const int weight = tp_module_is_layer(tp_model_module(build->model, module))
                           ? tp_model_find_parameter(build->model, module, "weight")
                           : -1;
    if (weight < 0 || build->decisions[weight].layout == NULL)
        return false;
    const tp_decision *at = &build->decisions[weight];
    char room[TP_LONGEST_NAME];
    tp_adapted part;
    const char *leaf = tp_names_leaf(
        tp_adapters_plain(tp_model_module(build->model, module)->name, room, &part));
    if (at->layout->size != size || at->gather_output || at->split_input)
        return false;
    if (of == OF_INPUT)
        return at->kind == TP_ROW;
    return at->kind == TP_COLUMN && leaf[0] == (of == OF_QUERIES ? 'q' : 'k');
}

/* Modules come after their parents, and everything below it before anything else. */
static int
find_weight(const tp_build *build, int parent, subject of, int64_t size)
{
    const int count = tp_model_module_count(build->model);
    for (int i = parent + 1;
         i < count && tp_model_module(build->model, i)->parent >= parent; i++) {
        if (tp_adapters_parent(build->model, i) == parent && fits(build, i, of, size))
            return tp_model_find_parameter(build->model, i, "weight");
    }
    return -1;
}

int
tp_norms_follow(const tp_build *build, int module)
{
    const tp_module *at = tp_model_module(build->model, module);
    const int parent = tp_adapters_parent(build->model, module);
    char room[TP_LONGEST_NAME];
    tp_adapted part;
    const int name = find_name(tp_names_leaf(tp_adapters_plain(at->name, room, &part)));
    const int scale = tp_model_find_parameter(build->model, module, "weight");
    if (name < 0 || scale < 0 || parent < 0 || tp_module_is_layer(at) ||
        build->decisions[scale].layout != NULL)
        return -1;
    const tp_parameter *weight = tp_model_parameter(build->model, scale);
    const tp_geometry *geometry = tp_geometries_at(build->geometries, parent);
    /* A norm over one head works on full heads, also where there is one head. */
    if (weight->dims != 1 || (names[name].of != OF_INPUT && geometry != NULL &&
                              weight->shape[0] == geometry->head_size))
        return -1;
    return find_weight(build, parent, names[name].of, weight->shape[0]);
}

int
tp_norms_settle(tp_build *build, tp_error *err)
{
    (void)err;
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const int module = tp_model_parameter(build->model, i)->module;
        if (build->decisions[i].kind == TP_REPLICATED_SUM &&
            tp_norms_follow(build, module) >= 0)
            build->decisions[i].kind = TP_REPLICATED;
    }
    return 0;
}
