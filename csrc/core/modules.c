/* SPDX-License-Identifier: Apache-2.0 */
/* modules.c -- styles of a transformers plan that speak of modules, not of weights. */
#include "modules.h"

static int
note_unknown(tp_build *build, const tp_rule *rule, tp_error *err)
{
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text,
                "rule '%s' (%s): this style is not supported and changes nothing",
                rule->label, tp_source_name(rule->source));
    return tp_build_note(build, &text, err);
}

/* Give the modules that `rule` names to it; returns whether there are any. */
static bool
take_modules(tp_build *build, int index, const tp_rule *rule)
{
    const char *prefix = tp_model_get_facts(build->model)->prefix;
    bool any = false;
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        const char *name = tp_model_module(build->model, i)->name;
        if (build->module_rules[i] >= 0 ||
            !tp_hfplan_match(rule->hf_pattern, prefix, name))
            continue;
        build->module_rules[i] = index;
        any = true;
    }
    return any;
}

int
tp_modules_choose(tp_build *build, tp_error *err)
{
    for (int i = 0; i < tp_model_module_count(build->model); i++)
        build->module_rules[i] = -1;
    for (int i = 0; i < tp_rules_count(build->rules); i++) {
        const tp_rule *rule = tp_rules_at(build->rules, i);
        if (rule->style == TP_STYLE_CUT || !take_modules(build, i, rule))
            continue;
        build->matched[i] = true;
        if (rule->style == TP_STYLE_UNKNOWN && note_unknown(build, rule, err) < 0)
            return -1;
    }
    return 0;
}
