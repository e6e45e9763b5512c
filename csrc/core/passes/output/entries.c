/* SPDX-License-Identifier: Apache-2.0 */
/* entries.c -- the entries of a plan: what was decided over each parameter. */
#include "passes/output/entries.h"

int
tp_entries_make(tp_build *build, tp_error *err)
{
    tp_plan *plan = build->plan;
    const int count = tp_model_parameter_count(build->model);
    plan->entries =
        tp_arena_take(plan->arena, (size_t)count + 1, sizeof(*plan->entries), err);
    if (plan->entries == NULL)
        return -1;
    for (int i = 0; i < count; i++) {
        const int first = tp_build_first(build, i);
        const tp_choice *choice = &build->choices[first];
        const tp_decision *decision = &build->decisions[first];
        plan->entries[i] = (tp_entry){i,
                                      decision->kind,
                                      choice->source,
                                      choice->rule,
                                      decision->dim,
                                      decision->outer,
                                      decision->inner,
                                      decision->layout};
    }
    plan->entry_count = count;
    return 0;
}
