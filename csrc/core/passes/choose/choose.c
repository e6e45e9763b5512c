/* SPDX-License-Identifier: Apache-2.0 */
/* choose.c -- which rule decides over which parameter. */
#include "passes/choose/choose.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    const char **labels; /* of the rules, which may be gone before the plan is */
    int *found;          /* room for one index per rule */
    char *compared;      /* [rules][rules]: the pair was compared */
    tp_long_matches matches;
} search;

/* Of a plan: a few seconds in all. */
#define MOST_LONG_MATCHES 20000

int
tp_choose_weight_of(const tp_build *build, int index)
{
    const tp_parameter *parameter = tp_model_parameter(build->model, index);
    if (strcmp(parameter->leaf, "bias") != 0 ||
        !tp_module_is_layer(tp_model_module(build->model, parameter->module)))
        return -1;
    return tp_model_find_parameter(build->model, parameter->module, "weight");
}

bool
tp_choose_is_taken(const tp_build *build, int index)
{
    for (int i = tp_build_first(build, index); i >= 0; i = build->next_name[i]) {
        if (build->choices[i].spec != NULL)
            return true;
    }
    return false;
}

static bool
same_shape(const tp_shape *a, const tp_shape *b)
{
    bool same = a->dims == b->dims && a->pieces == b->pieces;
    for (int i = 0; same && i < a->dims; i++)
        same = a->sizes[i] == b->sizes[i];
    for (int i = 0; same && i < a->pieces; i++)
        same = a->piece[i] == b->piece[i];
    return same;
}

static bool
same_spec(const tp_spec *a, const tp_spec *b)
{
    return a->partition == b->partition && a->dim == b->dim &&
           same_shape(&a->shape, &b->shape) && a->gather_output == b->gather_output &&
           a->split_input == b->split_input && a->sum_gradient == b->sum_gradient;
}

static int
warn_of_overlap(tp_build *build, search *with, int count, const char *name,
                tp_error *err)
{
    const int rules = tp_rules_count(build->rules);
    const int winner = with->found[0];
    const tp_rule *first = tp_rules_at(build->rules, winner);
    for (int i = 1; i < count && first->source == TP_FROM_CONFIG; i++) {
        const tp_rule *other = tp_rules_at(build->rules, with->found[i]);
        char *compared =
            &with->compared[(size_t)winner * (size_t)rules + (size_t)with->found[i]];
        if (other->source != TP_FROM_CONFIG || *compared)
            continue;
        *compared = 1;
        if (same_spec(&first->spec, &other->spec))
            continue;
        tp_text text = TP_NO_TEXT;
        tp_text_add(&text,
                    "rules '%s' and '%s' both match '%s' and ask for different things; "
                    "the first one, '%s', decides",
                    first->label, other->label, name, first->label);
        if (tp_build_message(build, &text, err) < 0)
            return -1;
    }
    return 0;
}

static int
choose_one(tp_build *build, search *with, int index, tp_error *err)
{
    const tp_model_facts *facts = tp_model_get_facts(build->model);
    const tp_parameter *parameter = tp_model_parameter(build->model, index);
    const tp_module *module = tp_model_module(build->model, parameter->module);
    const tp_query query = {parameter->name, module->name, facts->model_type,
                            facts->prefix, build->stars};
    const int rules = tp_rules_count(build->rules);
    const int count = tp_rules_find_counted(build->rules, &query, &with->matches,
                                            with->found, rules, err);
    if (count <= 0)
        return count;
    int first = count;
    for (int i = count - 1; i >= 0; i--) {
        build->matched[with->found[i]] = true;
        if (tp_rules_at(build->rules, with->found[i])->style == TP_STYLE_SHARD)
            first = i;
    }
    if (first == count)
        return 0;
    const tp_rule *rule = tp_rules_at(build->rules, with->found[first]);
    build->choices[index] = (tp_choice){
        &rule->spec, rule->source, with->labels[with->found[first]], TP_REASON_RULE};
    return warn_of_overlap(build, with, count, parameter->name, err);
}

static const char **
copy_labels(tp_build *build, tp_error *err)
{
    tp_arena *arena = build->plan->arena;
    const int count = tp_rules_count(build->rules);
    const char **labels = tp_arena_take(arena, (size_t)count + 1, sizeof(*labels), err);
    for (int i = 0; labels != NULL && i < count; i++) {
        const char *label = tp_rules_at(build->rules, i)->label;
        labels[i] = tp_arena_text(arena, label, strlen(label), err);
        if (labels[i] == NULL)
            return NULL;
    }
    return labels;
}

int
tp_choose_rules(tp_build *build, tp_error *err)
{
    const size_t rules = (size_t)tp_rules_count(build->rules);
    const int parameters = tp_model_parameter_count(build->model);
    int result = -1;
    search with = {copy_labels(build, err),
                   calloc(rules + 1, sizeof(*with.found)),
                   calloc(rules + 1, rules + 1),
                   {MOST_LONG_MATCHES}};
    if (with.labels == NULL)
        goto done;
    if (with.found == NULL || with.compared == NULL) {
        tp_fail_memory(err);
        goto done;
    }
    for (int i = 0; i < parameters; i++) {
        build->choices[i] = (tp_choice)TP_NO_CHOICE;
        if (tp_choose_weight_of(build, i) < 0 && choose_one(build, &with, i, err) < 0)
            goto done;
    }
    result = 0;
done:
    free(with.found);
    free(with.compared);
    return result;
}
