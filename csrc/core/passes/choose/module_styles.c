/* SPDX-License-Identifier: Apache-2.0 */
/* module_styles.c -- styles of a transformers plan that speak of modules, not of
 * weights. */
#include "passes/choose/module_styles.h"

#include "model/adapters.h"

static int
warn_of_unknown(tp_build *build, const tp_rule *rule, tp_error *err)
{
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text,
                "rule '%s' (%s): this style is not supported and changes nothing",
                rule->label, tp_source_name(rule->source));
    return tp_build_message(build, &text, err);
}

static int
refuse_adapted(const tp_rule *rule, const char *name, tp_error *err)
{
    return tp_fail(
        err, TP_VALUE,
        "rule '%s' (%s) cannot be followed with an adapter on '%s': leave that "
        "layer out of the adapter's target_modules and target_parameters",
        rule->label, tp_source_name(rule->source), name);
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
            !tp_hf_plan_match(rule->hf_pattern, prefix, plain))
            continue;
        if (part > TP_ADAPTED_ROOT && rule->style != TP_STYLE_NOTHING)
            return refuse_adapted(rule, plain, err);
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
