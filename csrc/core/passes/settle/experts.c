/* SPDX-License-Identifier: Apache-2.0 */
/* experts.c -- modules that hold the weights of all their experts as tensors. */
#include "passes/settle/experts.h"

#include <string.h>

#include "passes/resolve/raw.h"

enum { MATRIX_DIMS = 3, BIAS_DIMS = 2 };

static const char divided_rule[] = "expert bias divided by TP size";
static const tp_spec divided = {
    .partition = TP_PARTITION_SKIP, .dim = -1, .sum_gradient = true};

/* What the weights of a module of experts that give its output are called; they are
 * sharded along the features that they take. */
static const char *const output_names[] = {"down", "w2", "output_linear", "fc2",
                                           "linear2"};

static bool
gives_output(const char *leaf)
{
    for (size_t i = 0; i < sizeof(output_names) / sizeof(output_names[0]); i++) {
        if (strncmp(leaf, output_names[i], strlen(output_names[i])) == 0)
            return true;
    }
    return false;
}

static bool
is_sharded_matrix(const tp_build *build, int index)
{
    return build->decisions[index].layout != NULL && tp_raw_is(build->model, index) &&
           tp_model_parameter(build->model, index)->dims == MATRIX_DIMS;
}

static bool
has_rule(const tp_build *build, int module)
{
    const int rule = build->module_rules[module];
    return rule >= 0 && tp_rules_at(build->rules, rule)->style == TP_STYLE_EXPERTS;
}

/* Experts that a rule names, or with weights that are sharded along features that one
 * makes and another takes. */
static bool
is_experts(const tp_build *build, int module)
{
    bool any = false, columns = false, rows = false;
    for (int i = tp_model_first_parameter(build->model, module); i >= 0;
         i = tp_model_next_parameter(build->model, i)) {
        if (!is_sharded_matrix(build, i))
            continue;
        any = true;
        columns |= build->decisions[i].kind == TP_COLUMN;
        rows |= build->decisions[i].kind == TP_ROW;
    }
    const int stacked = build->stacked[module];
    return (any && (has_rule(build, module) || (columns && rows))) ||
           (stacked >= 0 && build->decisions[stacked].layout != NULL);
}

/* The sharded weight that the bias [experts, features] belongs to: by its name, or else
 * the one whose sharded features it has. -1: none. */
static int
weight_of(const tp_build *build, const tp_parameter *bias)
{
    int fits = -1;
    for (int i = tp_model_first_parameter(build->model, bias->module); i >= 0;
         i = tp_model_next_parameter(build->model, i)) {
        const tp_parameter *at = tp_model_parameter(build->model, i);
        if (!is_sharded_matrix(build, i) || at->shape[0] != bias->shape[0])
            continue;
        const size_t size = strlen(at->leaf);
        if (strncmp(bias->leaf, at->leaf, size) == 0 &&
            strcmp(bias->leaf + size, "_bias") == 0)
            return i;
        if (!gives_output(at->leaf) &&
            at->shape[build->decisions[i].dim] == bias->shape[1])
            fits = i;
    }
    return fits;
}

/* The bias of features that are sharded is sharded alike; one of the output is added
 * once, each rank giving its share, so that its gradient is partial on each. */
static void
decide_bias(tp_build *build, int index)
{
    const tp_parameter *bias = tp_model_parameter(build->model, index);
    const int weight = weight_of(build, bias);
    if (weight >= 0) {
        const tp_parameter *at = tp_model_parameter(build->model, weight);
        if (!gives_output(at->leaf) &&
            at->shape[build->decisions[weight].dim] == bias->shape[1]) {
            tp_raw_follow(build, index, weight, 1);
            return;
        }
    }
    build->choices[index] =
        (tp_choice){&divided, TP_FROM_DEFAULT, divided_rule, TP_REASON_EXPERT_BIAS};
    build->decisions[index] = (tp_decision)TP_NO_DECISION;
    build->decisions[index].kind = TP_REPLICATED_SUM;
}

/* Of one row for each expert. What has no such name, as a router's weight, is not added
 * to the output. */
static bool
is_bias(const tp_parameter *parameter)
{
    static const char ending[] = "bias";
    const size_t size = strlen(parameter->leaf), tail = sizeof(ending) - 1;
    return parameter->dims == BIAS_DIMS && size >= tail &&
           strcmp(parameter->leaf + size - tail, ending) == 0;
}

int
tp_experts_settle(tp_build *build, tp_error *err)
{
    (void)err;
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        build->experts[i] = is_experts(build, i);
        for (int j = tp_model_first_parameter(build->model, i);
             j >= 0 && build->experts[i];
             j = tp_model_next_parameter(build->model, j)) {
            if (is_bias(tp_model_parameter(build->model, j)) &&
                build->choices[j].spec == NULL && tp_raw_is(build->model, j))
                decide_bias(build, j);
        }
    }
    return 0;
}

int
tp_experts_divided(const tp_build *build, int module, int *out)
{
    int count = 0;
    for (int i = tp_model_first_parameter(build->model, module); i >= 0;
         i = tp_model_next_parameter(build->model, i)) {
        if (build->choices[i].reason != TP_REASON_EXPERT_BIAS)
            continue;
        if (out != NULL)
            out[count] = i;
        count++;
    }
    return count;
}

int
tp_experts_side(const tp_build *build, int module)
{
    const int weight = tp_model_find_parameter(build->model, module, "weight");
    if (weight < 0 || !is_sharded_matrix(build, weight))
        return -1;
    for (int i = module; i >= 0; i = tp_model_module(build->model, i)->parent) {
        if (build->experts[i] || has_rule(build, i))
            return -1; /* which sums for all that is in it */
    }
    return weight;
}

bool
tp_experts_share(const tp_build *build, int module)
{
    const int rule = build->module_rules[module];
    const int parent = tp_model_module(build->model, module)->parent;
    return rule >= 0 && parent >= 0 && build->experts[parent] &&
           tp_rules_at(build->rules, rule)->style == TP_STYLE_SHARE;
}
