/* SPDX-License-Identifier: Apache-2.0 */
/* passes.c -- how a plan is made: the passes in their order. */
#include "passes/passes.h"

#include <stdlib.h>

#include "passes/alone.h"
#include "passes/choose.h"
#include "passes/defaults.h"
#include "passes/experts.h"
#include "passes/head_tables.h"
#include "passes/locals.h"
#include "passes/modules.h"
#include "passes/norms.h"
#include "passes/nothing_sharded.h"
#include "passes/output_head.h"
#include "passes/pair.h"
#include "passes/pair_experts.h"
#include "passes/plan_layers.h"
#include "passes/resolve.h"
#include "passes/sequence.h"
#include "passes/siblings.h"
#include "passes/ties.h"
#include "passes/unmatched.h"
#include "passes/whole.h"
#include "plan/plan_build.h"
#include "plan/plan_hash.h"

enum { MOST_RANKS = 4096 };

static int
check_options(const tp_plan_options *options, tp_error *err)
{
    if (options->ranks < 1 || options->ranks > MOST_RANKS)
        return tp_fail(
            err, TP_VALUE,
            "the tensor-parallel degree is %d, but it must lie between 1 and "
            "%d",
            options->ranks, MOST_RANKS);
    if (options->grain < 1)
        return tp_fail(err, TP_VALUE, "tp_grain_size is %lld, but it must be positive",
                       (long long)options->grain);
    if (options->embedding_dim != 0 && options->embedding_dim != 1)
        return tp_fail(
            err, TP_VALUE,
            "embedding_partition_dim is %d, but it must be 0 (vocabulary) or "
            "1 (hidden)",
            options->embedding_dim);
    return 0;
}

static void
link_names(tp_build *build)
{
    const int count = tp_model_parameter_count(build->model);
    for (int i = 0; i < count; i++)
        build->next_name[i] = -1;
    for (int i = count - 1; i >= 0; i--) {
        const int first = tp_build_first(build, i);
        if (first != i) {
            build->next_name[i] = build->next_name[first];
            build->next_name[first] = i;
        }
    }
}

static int
open_build(tp_build *build, tp_error *err)
{
    const size_t parameters = (size_t)tp_model_parameter_count(build->model) + 1;
    const size_t rules = (size_t)tp_rules_count(build->rules) + 1;
    const size_t modules = (size_t)tp_model_module_count(build->model) + 1;
    build->choices = calloc(parameters, sizeof(*build->choices));
    build->decisions = calloc(parameters, sizeof(*build->decisions));
    build->next_name = calloc(parameters, sizeof(*build->next_name));
    build->matched = calloc(rules, sizeof(*build->matched));
    build->module_rules = calloc(modules, sizeof(*build->module_rules));
    build->experts = calloc(modules, sizeof(*build->experts));
    build->stacked = calloc(modules, sizeof(*build->stacked));
    build->attentions = calloc(modules, sizeof(*build->attentions));
    if (build->module_rules == NULL || build->experts == NULL ||
        build->stacked == NULL || build->attentions == NULL || build->choices == NULL ||
        build->decisions == NULL || build->next_name == NULL || build->matched == NULL)
        return tp_fail_memory(err);
    for (size_t i = 0; i < modules; i++) {
        build->attentions[i] = TP_ATTENTION_NEAR;
        build->stacked[i] = -1;
    }
    link_names(build);
    if (tp_layouts_new(build->plan->arena, build->options->ranks, &build->layouts,
                       err) < 0)
        return -1;
    return tp_geometries_new(build->model, &build->geometries, err);
}

static void
close_build(tp_build *build)
{
    free(build->choices);
    free(build->decisions);
    free(build->next_name);
    free(build->matched);
    free(build->module_rules);
    free(build->experts);
    free(build->stacked);
    free(build->attentions);
    tp_layouts_free(build->layouts);
    tp_geometries_free(build->geometries);
}

/* Decide over all parameters but the biases of layers, or over those. */
static int
resolve_all(tp_build *build, bool biases, tp_error *err)
{
    const int count = tp_model_parameter_count(build->model);
    for (int i = 0; i < count; i++) {
        const int weight = tp_choose_weight_of(build, i);
        int result = 0;
        if (weight >= 0 && biases)
            result = tp_resolve_bias(build, i, weight, err);
        else if (weight < 0 && !biases)
            result = tp_resolve_parameter(build, i, err);
        else if (weight >= 0)
            build->decisions[i] = (tp_decision)TP_NO_DECISION;
        if (result < 0)
            return -1;
    }
    return 0;
}

static int
make_entries(tp_build *build, tp_error *err)
{
    tp_plan *plan = build->plan;
    const int count = tp_model_parameter_count(build->model);
    plan->entries =
        tp_arena_take(plan->arena, (size_t)count + 1, sizeof(*plan->entries), err);
    if (plan->entries == NULL)
        return -1;
    for (int i = 0; i < count; i++) {
        const int first = tp_build_first(build, i);
        const tp_choice *choice = &build->choices[first];
        const tp_decision *decision = &build->decisions[first];
        plan->entries[i] = (tp_entry){i,
                                      decision->kind,
                                      choice->source,
                                      choice->rule,
                                      decision->dim,
                                      decision->outer,
                                      decision->inner,
                                      decision->layout};
    }
    plan->entry_count = count;
    return 0;
}

/* Weights come before ties, because a name without a rule follows what another
 * name came to, and biases last, because they follow their weights. */
static int
decide(tp_build *build, tp_error *err)
{
    if (tp_choose_rules(build, err) < 0 || tp_modules_choose(build, err) < 0 ||
        tp_whole_choose(build, err) < 0 || tp_pair_choose(build, err) < 0 ||
        tp_pair_experts_choose(build, err) < 0 || tp_whole_choose_apart(build, err) < 0)
        return -1;
    tp_defaults_choose(build);
    if (tp_alone_choose(build, err) < 0 || resolve_all(build, false, err) < 0 ||
        tp_ties_settle(build, err) < 0)
        return -1;
    tp_experts_settle(build);
    tp_norms_settle(build);
    if (tp_head_tables_settle(build, err) < 0 || tp_defaults_inside(build, err) < 0 ||
        resolve_all(build, true, err) < 0 || tp_ties_settle_biases(build, err) < 0 ||
        tp_unmatched_rules(build, err) < 0 || tp_unmatched_layers(build, err) < 0)
        return -1;
    if (make_entries(build, err) < 0 || tp_plan_layers_make(build, err) < 0 ||
        tp_siblings_make(build, err) < 0 || tp_sequence_make(build, err) < 0)
        return -1;
    if (tp_output_head_find(build, err) < 0 || tp_locals_make(build, err) < 0)
        return -1;
    return tp_nothing_sharded_refuse(build, err);
}

int
tp_plan_new(const tp_model *model, const tp_rules *rules,
            const tp_plan_options *options, tp_plan **out, tp_error *err)
{
    *out = NULL;
    if (check_options(options, err) < 0)
        return -1;
    tp_plan *plan = calloc(1, sizeof(*plan));
    if (plan == NULL)
        return tp_fail_memory(err);
    plan->model = model;
    plan->ranks = options->ranks;
    plan->logits_layer = -1;

    tp_build build = {.model = model, .rules = rules, .options = options, .plan = plan};
    int result = tp_arena_new(&plan->arena, err);
    if (result == 0)
        result = open_build(&build, err);
    if (result == 0)
        result = decide(&build, err);
    if (result == 0) {
        plan->hash = tp_plan_hash_make(plan);
        *out = plan;
        plan = NULL;
    }
    close_build(&build);
    tp_plan_free(plan);
    return result;
}
