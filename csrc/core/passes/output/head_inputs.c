/* SPDX-License-Identifier: Apache-2.0 */
/* head_inputs.c -- attention that is given something for each head from outside. */
#include "passes/output/head_inputs.h"

#include "rules/families.h"

/* A transformers plan has no way to say it, and is believed. */
static bool
may_be_given(const tp_build *build, int parameter)
{
    const tp_source source = build->choices[parameter].source;
    return source != TP_FROM_HF && build->decisions[parameter].attention >= 0;
}

int
tp_head_inputs_find(tp_build *build, const tp_layout **out, tp_error *err)
{
    const char *type = tp_model_get_facts(build->model)->model_type;
    if (!tp_family_gives_heads(type))
        return 0;
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const int attention = build->decisions[i].attention;
        if (!may_be_given(build, i) || out[attention] != NULL)
            continue;
        const tp_heads heads = tp_geometries_at(build->geometries, attention)->heads;
        const tp_piece piece = {heads.query, 1, TP_PIECE_QUERY};
        if (tp_layout_cache_get(build->layouts, &piece, 1, heads, &out[attention],
                                err) < 0)
            return -1;
    }
    return 0;
}
