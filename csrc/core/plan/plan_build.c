/* SPDX-License-Identifier: Apache-2.0 */
/* plan_build.c -- what the files that make a plan share. */
#include "plan/plan_build.h"

#include <stdlib.h>
#include <string.h>

#include "plan/view.h"

int
tp_build_first(const tp_build *build, int parameter)
{
    const int first = tp_model_parameter(build->model, parameter)->tied_to;
    return first >= 0 ? first : parameter;
}

bool
tp_build_in_experts(const tp_build *build, int module)
{
    for (int i = module; i >= 0; i = tp_model_module(build->model, i)->parent) {
        const int rule = build->module_rules[i];
        if (rule >= 0 && tp_rules_at(build->rules, rule)->style == TP_STYLE_EXPERTS)
            return true;
    }
    return false;
}

/* The list doubles inside the arena, which gives nothing back: messages are few. */
static int
reserve_message(tp_plan *plan, tp_error *err)
{
    if (plan->message_count < plan->message_room)
        return 0;
    const int room = plan->message_room == 0 ? 8 : plan->message_room * 2;
    tp_message *messages =
        tp_arena_take(plan->arena, (size_t)room, sizeof(*messages), err);
    if (messages == NULL)
        return -1;
    if (plan->message_count > 0)
        memcpy(messages, plan->messages,
               (size_t)plan->message_count * sizeof(*messages));
    plan->messages = messages;
    plan->message_room = room;
    return 0;
}

const char *
tp_build_text(tp_build *build, tp_text *text, tp_error *err)
{
    char *line = NULL;
    if (tp_text_take(text, &line, err) < 0)
        return NULL;
    const char *copy = tp_arena_text(build->plan->arena, line, strlen(line), err);
    free(line);
    return copy;
}

int
tp_build_message(tp_build *build, tp_text *text, tp_error *err)
{
    tp_plan *plan = build->plan;
    const char *line = tp_build_text(build, text, err);
    if (line == NULL || reserve_message(plan, err) < 0)
        return -1;
    plan->messages[plan->message_count++] = (tp_message){line};
    return 0;
}

int
tp_build_refuse(const tp_build *build, int parameter, const tp_choice *choice,
                tp_error *err)
{
    const tp_parameter *at = tp_model_parameter(build->model, parameter);
    char sizes[TP_VIEW_SIZES];
    if (err->code != TP_VALUE)
        return -1;
    tp_view_sizes(at->shape, at->dims, sizes);
    return tp_fail(
        err, TP_VALUE, "cannot shard '%s' %s over %d rank%s by rule '%s' (%s): %s",
        at->name, sizes, build->options->ranks, build->options->ranks == 1 ? "" : "s",
        choice->rule, tp_source_name(choice->source), tp_error_text(err));
}
