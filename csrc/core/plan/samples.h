/* SPDX-License-Identifier: Apache-2.0 */
/* samples.h -- two parameters that stand for all that differ in indices only. */
#ifndef TP_SAMPLES_H
#define TP_SAMPLES_H

#include "plan/plan.h"

/* The indices, ascending, of the first and of the last entry of each pattern of names.
 * `out` has room for every entry of the plan. */
int tp_plan_samples(const tp_plan *plan, int *out, int *count, tp_error *err);

#endif
