/* SPDX-License-Identifier: Apache-2.0 */
/* passes.h -- how a plan is made.
 *
 * The one way to make a plan. What it came to is read through plan/plan.h. */
#ifndef TP_PASSES_H
#define TP_PASSES_H

#include "plan/plan.h"

/* Decide over every parameter of `model`. `model` and `rules` are borrowed for
 * the call and the model for the plan's whole life. Everything that cannot be right is
 * refused with TP_VALUE, the message naming parameter, rule and sizes. */
int tp_plan_new(const tp_model *model, const tp_rules *rules,
                const tp_plan_options *options, tp_plan **out, tp_error *err);

#endif
