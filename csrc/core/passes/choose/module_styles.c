/* SPDX-License-Identifier: Apache-2.0 */
/* module_styles.c -- styles of a transformers plan that speak of modules, not of
 * weights. */
#include "passes/choose/module_styles.h"

#include <stdio.h>
#include <string.h>

#include "model/adapters.h"
#include "model/names.h"

static int
warn_of_unknown(tp_build *build, const tp_rule *rule, tp_error *err)
{
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text,
                "rule '%s' (%s): this style is not supported and changes nothing",
                rule->label, tp_source_name(rule->source));
    return tp_build_message(build, &text, err);
}

/* Whether a rule with a style that changes modules names the module `plain`. */
static bool
has_module_style(const tp_build *build, const char *plain)
{
    const char *prefix = tp_model_get_facts(build->model)->prefix;
    for (int i = 0; i < tp_rules_count(build->rules); i++) {
        const tp_rule *rule = tp_rules_at(build->rules, i);
        if (rule->style != TP_STYLE_SHARD && rule->style != TP_STYLE_NOTHING &&
            tp_hf_plan_match(rule->hf_pattern, prefix, plain, build->stars[i]))
            return true;
    }
    return false;
}

/* Add "'q_proj', 'v_proj'" to `list`: the leaves of the layers with adapters that no
 * such rule names, each once. */
static void
add_other_layers(const tp_build *build, tp_text *list)
{
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        const char *name = tp_model_module(build->model, i)->name;
        char room[TP_LONGEST_NAME], quoted[TP_LONGEST_NAME + 2];
        tp_adapted part;
        const char *plain = tp_adapters_plain(name, room, &part);
        if (part != TP_ADAPTED_LAYER ||
            strcmp(tp_names_leaf(name), "base_layer") != 0 ||
            has_module_style(build, plain))
            continue;
        snprintf(quoted, sizeof(quoted), "'%s'", tp_names_leaf(plain));
        if (list->data == NULL || strstr(list->data, quoted) == NULL)
            tp_text_add(list, "%s%s", list->size > 0 ? ", " : "", quoted);
    }
}

static int
refuse_adapted(const tp_build *build, const tp_rule *rule, const char *name,
               tp_error *err)
{
    tp_text others = TP_NO_TEXT, text = TP_NO_TEXT;
    add_other_layers(build, &others);
    tp_text_add(&text,
                "rule '%s' (%s) cannot be followed with an adapter on '%s': leave that "
                "layer out of the adapter's target_modules and target_parameters",
                rule->label, tp_source_name(rule->source), name);
    if (others.data != NULL)
        tp_text_add(&text,
                    "; in place of 'all-linear', which takes it in, name the others: "
                    "target_modules=[%s]",
                    others.data);
    text.failed |= others.failed;
    tp_text_free(&others);
    return tp_text_fail(&text, TP_VALUE, err);
}

/* Give the modules that `rule` names to it; `any` says whether there are some. */
static int
take_modules(tp_build *build, int index, const tp_rule *rule, bool *any, tp_error *err)
{
    const char *prefix = tp_model_get_facts(build->model)->prefix;
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        const char *name = tp_model_module(build->model, i)->name;
        char room[TP_LONGEST_NAME];
        tp_adapted part;
        const char *plain = tp_adapters_plain(name, room, &part);
        if (build->module_rules[i] >= 0 ||
            !tp_hf_plan_match(rule->hf_pattern, prefix, plain, build->stars[index]))
            continue;
        if (part > TP_ADAPTED_ROOT && rule->style != TP_STYLE_NOTHING)
            return refuse_adapted(build, rule, plain, err);
        build->module_rules[i] = index;
        *any = true;
    }
    return 0;
}

int
tp_module_styles_choose(tp_build *build, tp_error *err)
{
    for (int i = 0; i < tp_model_module_count(build->model); i++)
        build->module_rules[i] = -1;
    for (int i = 0; i < tp_rules_count(build->rules); i++) {
        const tp_rule *rule = tp_rules_at(build->rules, i);
        bool any = false;
        if (rule->style == TP_STYLE_SHARD)
            continue;
        if (take_modules(build, i, rule, &any, err) < 0)
            return -1;
        if (!any)
            continue;
        build->matched[i] = true;
        if (rule->style == TP_STYLE_UNKNOWN && warn_of_unknown(build, rule, err) < 0)
            return -1;
    }
    return 0;
}
