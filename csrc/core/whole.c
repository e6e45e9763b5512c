/* SPDX-License-Identifier: Apache-2.0 */
/* whole.c -- modules that stay whole whatever the rules say. */
#include "whole.h"

#include <stdlib.h>

#include "hfplan.h"
#include "names.h"
#include "near.h"

static const tp_spec left_whole = {.cut = TP_CUT_SKIP, .dim = -1};

bool
tp_whole_is(const tp_choice *choice)
{
    return choice->spec == &left_whole;
}

static int
unknown_module(const tp_build *build, int index, tp_error *err)
{
    const char *wanted = build->options->whole[index];
    tp_arena *arena = NULL;
    tp_names names;
    int result = tp_arena_new(&arena, err);
    if (result == 0)
        result = tp_names_of_model(arena, build->model, &names, err);
    if (result == 0) {
        int near[1];
        tp_text text = TP_NO_TEXT;
        tp_text_add(&text, "whole[%d]: no module is called '%s'", index, wanted);
        if (tp_near(wanted, names.names, names.count, 1, near) > 0)
            tp_text_add(&text, "; did you mean '%s'?", names.names[near[0]]);
        result = tp_text_fail(&text, TP_VALUE, err);
    }
    tp_arena_free(arena);
    return result;
}

/* Parents come before their children, so one pass reaches everything below. */
static int
mark(const tp_build *build, bool *whole, bool *found, tp_error *err)
{
    const tp_plan_options *options = build->options;
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        const tp_module *module = tp_model_module(build->model, i);
        whole[i] = module->parent >= 0 && whole[module->parent];
        for (int j = 0; j < options->whole_count; j++) {
            if (tp_hfplan_match(options->whole[j], "", module->name))
                whole[i] = found[j] = true;
        }
    }
    for (int j = 0; j < options->whole_count; j++) {
        if (!found[j])
            return unknown_module(build, j, err);
    }
    return 0;
}

static void
leave_tensor(tp_build *build, int parameter)
{
    const int first = tp_build_first(build, parameter);
    for (int i = first; i >= 0; i = build->next_name[i])
        build->choices[i] = (tp_choice){&left_whole, TP_FROM_NOTHING, "left whole"};
}

int
tp_whole_choose(tp_build *build, tp_error *err)
{
    if (build->options->whole_count == 0)
        return 0;
    const size_t modules = (size_t)tp_model_module_count(build->model) + 1;
    bool *whole = calloc(modules, sizeof(*whole));
    bool *found = calloc((size_t)build->options->whole_count, sizeof(*found));
    int result = -1;
    if (whole == NULL || found == NULL)
        tp_fail_memory(err);
    else
        result = mark(build, whole, found, err);
    for (int i = 0; result == 0 && i < tp_model_parameter_count(build->model); i++) {
        if (whole[tp_model_parameter(build->model, i)->module])
            leave_tensor(build, i);
    }
    free(whole);
    free(found);
    return result;
}
