/* SPDX-License-Identifier: Apache-2.0 */
/* unmatched.c -- rules that match nothing, and layers that no rule matches. */
#include "passes/output/unmatched.h"

#include <string.h>

#include "base/did_you_mean.h"
#include "model/adapters.h"
#include "model/names.h"
#include "rules/hf_tp_plan.h"

enum { NEAREST = 3, NAMED_LAYERS = 5, MOST_NAMES = 4000 };

/* A pattern as a name that can be held against names: escapes and anchors go,
 * `.*`, `.+`, `\d` and `\d+` become `*`, and what leads to the first part that
 * is spelled out is dropped. `out` has room for the pattern and a NUL. */
static void
spell_out(const char *pattern, char *out)
{
    char *to = out;
    for (const char *at = pattern; *at != '\0'; at++) {
        const bool any = at[0] == '.' && (at[1] == '*' || at[1] == '+');
        const bool digit = at[0] == '\\' && at[1] == 'd';
        if (any || digit) {
            *to++ = '*';
            at += digit && at[2] == '+' ? 2 : 1;
        } else if (*at != '\\' && *at != '^' && *at != '$') {
            *to++ = *at;
        }
    }
    *to = '\0';
    const size_t lead = strspn(out, "*.");
    if (lead > 0 && out[lead] != '\0')
        memmove(out, out + lead, strlen(out + lead) + 1);
}

static const char *
pattern_of(const tp_rule *rule)
{
    if (rule->hf_pattern != NULL)
        return rule->hf_pattern;
    return rule->pattern_count > 0 ? tp_regex_pattern(rule->patterns[0]) : "";
}

static int
add_nearest(tp_arena *arena, const tp_names *names, const tp_rule *rule, tp_text *text,
            tp_error *err)
{
    const char *pattern = pattern_of(rule);
    char *wanted = tp_arena_text(arena, pattern, strlen(pattern), err);
    if (wanted == NULL)
        return -1;
    if (rule->hf_pattern == NULL)
        spell_out(pattern, wanted);
    int parts = 1;
    for (const char *at = wanted; *at != '\0'; at++)
        parts += *at == '.';

    tp_names tails;
    if (tp_names_tails(arena, names, parts, &tails, err) < 0)
        return -1;
    int found[NEAREST];
    const int count = tails.count < MOST_NAMES ? tails.count : MOST_NAMES;
    const int near = tp_did_you_mean(wanted, tails.names, count, NEAREST, found);
    for (int i = 0; i < near; i++)
        tp_text_add(text, "%s'%s'%s", i == 0 ? "; did you mean " : " or ",
                    tails.names[found[i]], i == near - 1 ? "?" : "");
    return 0;
}

/* Whether any rule that came with this one matched. The rows of a preset, like
 * the entries of a transformers plan, serve several models at once. */
static bool
source_matched(const tp_build *build, tp_source source)
{
    for (int i = 0; i < tp_rules_count(build->rules); i++) {
        if (tp_rules_at(build->rules, i)->source == source && build->matched[i])
            return true;
    }
    return false;
}

/* Whether the rule is one of the plan of a model's class that fits the model otherwise:
 * such a plan has the layers of all its variants, as dense and sparse blocks. */
static bool
is_of_variant(const tp_build *build, const tp_rule *rule)
{
    return rule->source == TP_FROM_HF && !rule->required &&
           source_matched(build, TP_FROM_HF);
}

/* Whether a rule of the same plan matched under a longer name: a plan that is put
 * together from those of the parts of a model has both. */
static bool
longer_matched(const tp_build *build, const tp_rule *rule)
{
    const size_t size = rule->hf_pattern == NULL ? 0 : strlen(rule->hf_pattern);
    for (int i = 0; size > 0 && i < tp_rules_count(build->rules); i++) {
        const char *other = tp_rules_at(build->rules, i)->hf_pattern;
        const size_t length = other == NULL ? 0 : strlen(other);
        if (build->matched[i] && length > size && other[length - size - 1] == '.' &&
            strcmp(other + length - size, rule->hf_pattern) == 0)
            return true;
    }
    return false;
}

static int
report(tp_build *build, tp_arena *arena, const tp_names *names, const tp_rule *rule,
       tp_error *err)
{
    const bool refuse =
        rule->required ||
        (build->options->strict &&
         (rule->source == TP_FROM_CONFIG ||
          (rule->source == TP_FROM_PRESET && !source_matched(build, TP_FROM_PRESET))));
    const char *pattern = pattern_of(rule);
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "rule '%s' (%s) matches nothing in the model: pattern '%s'",
                rule->label, tp_source_name(rule->source), pattern);
    if (rule->pattern_count > 1)
        tp_text_add(&text, " and %d more", rule->pattern_count - 1);
    if (refuse)
        tp_text_add(&text, rule->required ? "; correct it, or take it out of the plan"
                                          : "; correct it, or switch strict_mode off");
    if (add_nearest(arena, names, rule, &text, err) < 0) {
        tp_text_free(&text);
        return -1;
    }
    if (refuse)
        return tp_text_fail(&text, TP_VALUE, err);
    return tp_build_message(build, &text, err);
}

/* Whether a transformers plan speaks of a module that is there and has no weight. */
static bool
names_module(const tp_build *build, int index)
{
    const tp_rule *rule = tp_rules_at(build->rules, index);
    const char *prefix = tp_model_get_facts(build->model)->prefix;
    for (int i = 0; rule->hf_pattern != NULL && i < tp_model_module_count(build->model);
         i++) {
        const char *name = tp_model_module(build->model, i)->name;
        char room[TP_LONGEST_NAME];
        tp_adapted part;
        const char *plain = tp_adapters_plain(name, room, &part);
        if (tp_hf_plan_match(rule->hf_pattern, prefix, plain, build->stars[index]))
            return true;
    }
    return false;
}

int
tp_unmatched_rules(tp_build *build, tp_error *err)
{
    const char *model_type = tp_model_get_facts(build->model)->model_type;
    tp_arena *arena = NULL;
    tp_names names = {NULL, 0};
    int result = 0;
    for (int i = 0; result == 0 && i < tp_rules_count(build->rules); i++) {
        const tp_rule *rule = tp_rules_at(build->rules, i);
        if (build->matched[i] || !tp_rule_fits_model(rule, model_type) ||
            is_of_variant(build, rule) || longer_matched(build, rule) ||
            names_module(build, i))
            continue;
        if (arena == NULL && (tp_arena_new(&arena, err) < 0 ||
                              tp_names_of_model(arena, build->model, &names, err) < 0))
            result = -1;
        else
            result = report(build, arena, &names, rule, err);
    }
    tp_arena_free(arena);
    return result;
}

/* Whether the module is a linear layer about which nothing is said. */
static bool
is_open(const tp_build *build, int module)
{
    const tp_module_kind kind = tp_model_module(build->model, module)->kind;
    if (kind != TP_MODULE_LINEAR && kind != TP_MODULE_CONV1D)
        return false;
    const int weight = tp_model_find_parameter(build->model, module, "weight");
    return weight >= 0 && build->choices[weight].spec == NULL;
}

int
tp_unmatched_layers(tp_build *build, tp_error *err)
{
    if (!build->options->strict)
        return 0;
    tp_text named = TP_NO_TEXT;
    int count = 0;
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        if (!is_open(build, i))
            continue;
        if (count++ < NAMED_LAYERS)
            tp_text_add(&named, "%s'%s'", count > 1 ? ", " : "",
                        tp_model_module(build->model, i)->name);
    }
    if (count == 0)
        return 0;
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text,
                "strict_mode: no rule matches %d linear layer%s: %s%s; add rules for "
                "them, 'skip' to replicate them",
                count, count > 1 ? "s" : "", named.data == NULL ? "" : named.data,
                count > NAMED_LAYERS ? ", ..." : "");
    tp_text_free(&named);
    return tp_text_fail(&text, TP_VALUE, err);
}
