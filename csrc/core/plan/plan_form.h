/* SPDX-License-Identifier: Apache-2.0 */
/* plan_form.h -- whether two plans treat alike what is called alike, whatever its size.
 *
 * A small model stands for a large one where the plans have one form. */
#ifndef TP_PLAN_FORM_H
#define TP_PLAN_FORM_H

#include "base/text.h"
#include "plan/plan.h"

/* Append the first thing that only one of the plans has; nothing where they have one
 * form. Compared are, by names without their indices: classes of modules; kinds,
 * dimensions, ties, runs and holders of shards, and whether all ranks have as much;
 * layers and their collectives; integers; where tokens and logits are sharded. */
int tp_plan_form_difference(const tp_plan *plan, const tp_plan *other, tp_text *why,
                            tp_error *err);

#endif
