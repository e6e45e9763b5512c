/* SPDX-License-Identifier: Apache-2.0 */
/* choose.h -- which rule decides over which parameter.
 *
 * Asks the rules by name, once for each weight and each other parameter.
 * Knows nothing of shapes. */
#ifndef TP_CHOOSE_H
#define TP_CHOOSE_H

#include "plan/plan_build.h"

/* Fill `choices` and `matched`. A weight of a layer is asked for with the name
 * of its module, its bias follows it. Adds a message about different
 * specifications of partition_config that match one parameter. */
int tp_choose_rules(tp_build *build, tp_error *err);

/* The weight that parameter `index` is the bias of, or -1. */
int tp_choose_weight_of(const tp_build *build, int index);

/* Whether a rule or a default decides over any name of the parameter's tensor. */
bool tp_choose_is_taken(const tp_build *build, int index);

#endif
