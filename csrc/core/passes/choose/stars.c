/* SPDX-License-Identifier: Apache-2.0 */
/* stars.c -- how the `*` of the patterns of a transformers plan are read. */
#include "passes/choose/stars.h"

#include <string.h>

#include "model/adapters.h"

static bool
is_name(const char *pattern, const char *prefix, const char *name, tp_stars stars)
{
    char room[TP_LONGEST_NAME];
    tp_adapted part;
    if (tp_hf_plan_match(pattern, prefix, name, stars))
        return true;
    const char *plain = tp_adapters_plain(name, room, &part);
    return plain != name && tp_hf_plan_match(pattern, prefix, plain, stars);
}

/* Whether a module or a parameter of the model has such a name. */
static bool
names_something(const tp_model *model, const char *pattern, tp_stars stars)
{
    const char *prefix = tp_model_get_facts(model)->prefix;
    for (int i = 0; i < tp_model_module_count(model); i++) {
        if (is_name(pattern, prefix, tp_model_module(model, i)->name, stars))
            return true;
    }
    for (int i = 0; i < tp_model_parameter_count(model); i++) {
        if (is_name(pattern, prefix, tp_model_parameter(model, i)->name, stars))
            return true;
    }
    return false;
}

int
tp_stars_read(tp_build *build, tp_error *err)
{
    tp_text text = TP_NO_TEXT;
    for (int i = 0; i < tp_rules_count(build->rules); i++) {
        const char *pattern = tp_rules_at(build->rules, i)->hf_pattern;
        build->stars[i] = TP_STARS_INDICES;
        if (pattern == NULL || strchr(pattern, '*') == NULL ||
            names_something(build->model, pattern, TP_STARS_INDICES) ||
            !names_something(build->model, pattern, TP_STARS_TEXT))
            continue;
        build->stars[i] = TP_STARS_TEXT;
        tp_text_add(&text, "%s'%s'",
                    text.size > 0 ? ", "
                                  : "tp_plan: nothing has an index in the place of '*' "
                                    "in these patterns, so it stands for any text: ",
                    pattern);
    }
    if (text.size > 0 || text.failed)
        return tp_build_message(build, &text, err);
    return 0;
}
