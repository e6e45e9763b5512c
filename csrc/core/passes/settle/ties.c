/* SPDX-License-Identifier: Apache-2.0 */
/* ties.c -- one decision for all names of one tensor. */
#include "passes/settle/ties.h"

#include <string.h>

#include "passes/choose/choose.h"

static bool
same_shard(const tp_shard *a, const tp_shard *b)
{
    bool same = a->count == b->count;
    for (int i = 0; same && i < a->count; i++)
        same = a->runs[i].start == b->runs[i].start &&
               a->runs[i].length == b->runs[i].length &&
               a->runs[i].owner == b->runs[i].owner;
    return same;
}

/* Two ways to describe the pieces can come to the same runs. */
static bool
same_runs(const tp_layout *a, const tp_layout *b)
{
    bool same = a == b || (a->size == b->size && a->ranks == b->ranks);
    for (int rank = 0; same && a != b && rank < a->ranks; rank++)
        same = same_shard(&a->shards[rank], &b->shards[rank]);
    return same;
}

static bool
same_shards(const tp_decision *a, const tp_decision *b)
{
    return a->dim == b->dim && a->outer == b->outer && a->inner == b->inner &&
           same_runs(a->layout, b->layout);
}

/* Shard a name without a rule like `leader`, if its module can work with that:
 * along the rows of a matrix, whose output is made full again. */
static bool
follow(tp_build *build, int leader, int name)
{
    const tp_decision *from = &build->decisions[leader];
    const tp_parameter *at = tp_model_parameter(build->model, name);
    const tp_module_kind kind = tp_model_module(build->model, at->module)->kind;
    const bool matrix = kind == TP_MODULE_LINEAR || kind == TP_MODULE_EMBEDDING;
    if (build->choices[name].spec != NULL || !matrix || at->dims != 2 ||
        from->kind == TP_ROW || strcmp(at->leaf, "weight") != 0 || from->dim != 0 ||
        from->outer != 1 || from->attention >= 0)
        return false;
    tp_decision *to = &build->decisions[name];
    *to = *from;
    to->kind = kind == TP_MODULE_LINEAR ? TP_COLUMN : TP_VOCABULARY;
    to->gather_output = kind == TP_MODULE_LINEAR;
    to->split_input = false;
    build->choices[name] = build->choices[leader];
    return true;
}

static void
describe(const tp_build *build, int name, tp_text *text)
{
    const tp_choice *choice = &build->choices[name];
    const tp_decision *decision = &build->decisions[name];
    tp_text_add(text, "'%s' (", tp_model_parameter(build->model, name)->name);
    if (choice->spec == NULL)
        tp_text_add(text, "no rule");
    else
        tp_text_add(text, "rule '%s' of %s: %s", choice->rule,
                    tp_source_name(choice->source), tp_kind_name(decision->kind));
    if (decision->dim >= 0)
        tp_text_add(text, " along dimension %d", decision->dim);
    tp_text_add(text, ")");
}

static bool
is_sharded_by_config(const tp_build *build, int name)
{
    return build->choices[name].source == TP_FROM_CONFIG &&
           build->decisions[name].layout != NULL;
}

static int
disagree(tp_build *build, int first, int leader, int name, tp_error *err)
{
    const bool refuse =
        build->choices[name].spec != NULL &&
        (is_sharded_by_config(build, leader) || is_sharded_by_config(build, name));
    tp_text text = TP_NO_TEXT;
    describe(build, leader, &text);
    tp_text_add(&text, " and ");
    describe(build, name, &text);
    tp_text_add(
        &text, " are one tensor and %s",
        refuse
            ? "cannot be sharded in two ways; let both rules shard alike, or skip both"
            : "cannot be sharded alike; it stays replicated");
    if (refuse)
        return tp_text_fail(&text, TP_VALUE, err);

    for (int i = first; i >= 0; i = build->next_name[i]) {
        build->decisions[i] = (tp_decision)TP_NO_DECISION;
        build->choices[i].source = TP_FROM_NOTHING;
        build->choices[i].rule = "";
    }
    return tp_build_message(build, &text, err);
}

/* No name is sharded: the first rule speaks for all, or the one that sums. */
static void
settle_replicated(tp_build *build, int first)
{
    int speaker = -1;
    for (int i = first; i >= 0; i = build->next_name[i]) {
        const bool sums = build->decisions[i].kind == TP_REPLICATED_SUM;
        if (build->choices[i].spec != NULL &&
            (speaker < 0 ||
             (sums && build->decisions[speaker].kind != TP_REPLICATED_SUM)))
            speaker = i;
    }
    for (int i = first; speaker >= 0 && i >= 0; i = build->next_name[i]) {
        build->decisions[i] = build->decisions[speaker];
        build->choices[i] = build->choices[speaker];
    }
}

static int
settle_group(tp_build *build, int first, tp_error *err)
{
    int leader = first;
    while (leader >= 0 && build->decisions[leader].layout == NULL)
        leader = build->next_name[leader];
    if (leader < 0) {
        settle_replicated(build, first);
        return 0;
    }
    for (int i = first; i >= 0; i = build->next_name[i]) {
        const tp_decision *decision = &build->decisions[i];
        const bool agrees = decision->layout != NULL
                                ? same_shards(decision, &build->decisions[leader])
                                : follow(build, leader, i);
        if (!agrees)
            return disagree(build, first, leader, i, err);
    }
    return 0;
}

int
tp_ties_settle(tp_build *build, tp_error *err)
{
    const int count = tp_model_parameter_count(build->model);
    for (int i = 0; i < count; i++) {
        if (tp_build_first(build, i) == i && build->next_name[i] >= 0 &&
            settle_group(build, i, err) < 0)
            return -1;
    }
    return 0;
}

static int
settle_bias(tp_build *build, int bias, tp_error *err)
{
    const tp_decision *decision = &build->decisions[bias];
    for (int i = tp_build_first(build, bias); i >= 0; i = build->next_name[i]) {
        const tp_decision *other = &build->decisions[i];
        if (other->layout != NULL && same_shards(other, decision))
            continue;
        if (other->layout != NULL || build->choices[i].spec != NULL ||
            tp_choose_weight_of(build, i) >= 0) {
            tp_fail(err, TP_VALUE,
                    "it is one tensor with '%s', which is not sharded in the same way; "
                    "shard or skip the weights of both alike",
                    tp_model_parameter(build->model, i)->name);
            return tp_build_refuse(build, bias, &build->choices[bias], err);
        }
        build->decisions[i] = *decision;
        build->choices[i] = build->choices[bias];
    }
    return 0;
}

int
tp_ties_settle_biases(tp_build *build, tp_error *err)
{
    const int count = tp_model_parameter_count(build->model);
    for (int i = 0; i < count; i++) {
        const bool sharded = build->decisions[i].layout != NULL;
        if (sharded && tp_choose_weight_of(build, i) >= 0 &&
            settle_bias(build, i, err) < 0)
            return -1;
    }
    return 0;
}
