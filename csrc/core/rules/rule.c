/* SPDX-License-Identifier: Apache-2.0 */
/* rule.c -- the ordered rules that decide over parameters. */
#include "rules/rule.h"

#include <stdlib.h>
#include <string.h>

#include "base/text.h"
#include "model/adapters.h"
#include "model/names.h"
#include "rules/preset.h"

struct tp_rules {
    tp_rule *rules; /* owned, with all they point to */
    int count;
    int room;
};

static const char *const source_names[] = {
    [TP_FROM_CONFIG] = "partition_config",
    [TP_FROM_PRESET] = "preset",
    [TP_FROM_HF] = "tp_plan",
    [TP_FROM_FAMILY] = "family",
    [TP_FROM_HEURISTIC] = "heuristic",
    [TP_FROM_DEFAULT] = "default",
    [TP_FROM_NOTHING] = "-",
};

const char *
tp_source_name(tp_source source)
{
    return source_names[source];
}

void
tp_rule_clear(tp_rule *rule)
{
    for (int i = 0; rule->patterns != NULL && i < rule->pattern_count; i++)
        tp_regex_free(rule->patterns[i]);
    for (int i = 0; rule->model_types != NULL && i < rule->model_type_count; i++)
        free(rule->model_types[i]);
    free(rule->patterns);
    free(rule->model_types);
    free(rule->hf_pattern);
    free(rule->label);
}

int
tp_rules_new(tp_rules **out, tp_error *err)
{
    *out = calloc(1, sizeof(**out));
    return *out == NULL ? tp_fail_memory(err) : 0;
}

int
tp_rules_add(tp_rules *rules, tp_rule *rule, tp_error *err)
{
    if (rules->count == rules->room) {
        const int room = rules->room == 0 ? 16 : rules->room * 2;
        tp_rule *grown = realloc(rules->rules, (size_t)room * sizeof(*grown));
        if (grown == NULL) {
            tp_rule_clear(rule);
            return tp_fail_memory(err);
        }
        rules->rules = grown;
        rules->room = room;
    }
    rules->rules[rules->count++] = *rule;
    return 0;
}

static int
add_preset_row(tp_rules *rules, const tp_preset *preset, int index, tp_error *err)
{
    const tp_preset_row *row = &preset->rows[index];
    tp_rule rule = {.source = TP_FROM_PRESET, .spec = row->spec};
    tp_text label = TP_NO_TEXT;
    tp_text_add(&label, "preset %s[%d]", preset->name, index);
    if (tp_text_take(&label, &rule.label, err) < 0)
        goto fail;

    rule.patterns = calloc(1, sizeof(*rule.patterns));
    if (rule.patterns == NULL) {
        tp_fail_memory(err);
        goto fail;
    }
    if (tp_regex_new(row->pattern, NULL, &rule.patterns[0], err) < 0)
        goto fail;
    rule.pattern_count = 1;
    return tp_rules_add(rules, &rule, err);

fail:
    tp_rule_clear(&rule);
    return -1;
}

int
tp_rules_add_preset(tp_rules *rules, const char *name, tp_error *err)
{
    const tp_preset *preset = NULL;
    if (tp_preset_find(name, &preset, err) < 0)
        return -1;
    const int before = rules->count;
    for (int i = 0; i < preset->count; i++) {
        if (add_preset_row(rules, preset, i, err) < 0) {
            while (rules->count > before)
                tp_rule_clear(&rules->rules[--rules->count]);
            return -1;
        }
    }
    return 0;
}

/* The pairs behind the last `*`, or else of the last part: those in front of it may
 * be the model's prefix, without which names match, too. */
static tp_pairs
last_pairs(const char *pattern)
{
    const char *star = strrchr(pattern, '*');
    const char *last = star != NULL ? star + 1 : tp_names_leaf(pattern);
    return tp_subject_of(last, strlen(last)).pairs;
}

int
tp_rules_add_style(tp_rules *rules, const char *pattern, const char *style,
                   bool required, tp_error *err)
{
    tp_rule rule = {.source = TP_FROM_HF, .required = required};
    if (tp_hf_plan_style(style, pattern, &rule.style, &rule.spec, err) < 0)
        return -1;

    tp_text copy = TP_NO_TEXT;
    tp_text label = TP_NO_TEXT;
    tp_text_add(&copy, "%s", pattern);
    tp_text_add(&label, "%s: %s", pattern, style);
    if (tp_text_take(&copy, &rule.hf_pattern, err) < 0 ||
        tp_text_take(&label, &rule.label, err) < 0) {
        tp_text_free(&label);
        tp_rule_clear(&rule);
        return -1;
    }
    rule.hf_pairs = last_pairs(rule.hf_pattern);
    return tp_rules_add(rules, &rule, err);
}

int
tp_rules_count(const tp_rules *rules)
{
    return rules->count;
}

bool
tp_rules_have(const tp_rules *rules, tp_source source)
{
    for (int i = 0; i < rules->count; i++) {
        if (rules->rules[i].source == source)
            return true;
    }
    return false;
}

bool
tp_rules_only_skip(const tp_rules *rules)
{
    for (int i = 0; i < rules->count; i++) {
        const tp_rule *rule = &rules->rules[i];
        if (rule->style != TP_STYLE_SHARD ||
            rule->spec.partition != TP_PARTITION_SKIP || rule->spec.sum_gradient)
            return false;
    }
    return rules->count > 0;
}

const tp_rule *
tp_rules_at(const tp_rules *rules, int index)
{
    return &rules->rules[index];
}

bool
tp_rule_fits_model(const tp_rule *rule, const char *model_type)
{
    if (rule->model_type_count == 0)
        return true;
    for (int i = 0; model_type != NULL && i < rule->model_type_count; i++) {
        if (tp_text_same(rule->model_types[i], model_type))
            return true;
    }
    return false;
}

static int
match_patterns(const tp_rule *rule, const tp_subject *name, tp_long_matches *matches,
               bool *matched, tp_error *err)
{
    for (int i = 0; i < rule->pattern_count && !*matched; i++) {
        if (tp_regex_match_counted(rule->patterns[i], name, matches, matched, err) < 0)
            return -1;
    }
    return 0;
}

/* A name that rules are tried on. They know nothing of adapters, so that what is
 * adapted has another one without them; factors have none, and follow their layer. */
typedef struct {
    tp_subject given, plain;
    bool adapted;
    char room[TP_LONGEST_NAME];
} named;

static void
name_plainly(named *name)
{
    const tp_adapted part =
        tp_adapters_name(name->given.text, name->room, sizeof(name->room));
    name->adapted = part == TP_ADAPTED_ROOT || part == TP_ADAPTED_LAYER;
    if (name->adapted)
        name->plain = tp_subject_of(name->room, strlen(name->room));
}

static bool
match_hf(const tp_rule *rule, const char *prefix, tp_stars stars, const named *name)
{
    const char *pattern = rule->hf_pattern;
    if ((rule->hf_pairs & ~name->given.pairs) != 0)
        return false;
    return tp_hf_plan_match(pattern, prefix, name->given.text, stars) ||
           (name->adapted && tp_hf_plan_match(pattern, prefix, name->room, stars));
}

static int
match_name(const tp_rules *rules, int index, const tp_query *query, const named *name,
           tp_long_matches *matches, bool *matched, tp_error *err)
{
    const tp_rule *rule = &rules->rules[index];
    if (rule->hf_pattern != NULL) {
        const tp_stars stars =
            query->stars == NULL ? TP_STARS_INDICES : query->stars[index];
        *matched = match_hf(rule, query->prefix, stars, name);
        return 0;
    }
    if (match_patterns(rule, &name->given, matches, matched, err) < 0)
        return -1;
    return *matched || !name->adapted
               ? 0
               : match_patterns(rule, &name->plain, matches, matched, err);
}

int
tp_rules_find(const tp_rules *rules, const tp_query *query, int *found, int room,
              tp_error *err)
{
    return tp_rules_find_counted(rules, query, NULL, found, room, err);
}

int
tp_rules_find_counted(const tp_rules *rules, const tp_query *query,
                      tp_long_matches *matches, int *found, int room, tp_error *err)
{
    const bool twice = query->module != NULL;
    const char *second = twice ? query->module : "";
    named module, parameter;
    module.given = tp_subject_of(second, strlen(second));
    parameter.given =
        tp_subject_after(&module.given, query->parameter, strlen(query->parameter));
    name_plainly(&module);
    name_plainly(&parameter);
    int count = 0;
    for (int i = 0; i < rules->count; i++) {
        bool matched = false;
        if (!tp_rule_fits_model(&rules->rules[i], query->model_type))
            continue;
        if (match_name(rules, i, query, &parameter, matches, &matched, err) < 0)
            return -1;
        if (!matched && twice &&
            match_name(rules, i, query, &module, matches, &matched, err) < 0)
            return -1;
        if (!matched)
            continue;
        if (count < room)
            found[count] = i;
        count++;
    }
    return count;
}

void
tp_rules_free(tp_rules *rules)
{
    if (rules == NULL)
        return;
    for (int i = 0; i < rules->count; i++)
        tp_rule_clear(&rules->rules[i]);
    free(rules->rules);
    free(rules);
}
