/* SPDX-License-Identifier: Apache-2.0 */
/* samples.h -- the parameters whose gradients are compared for all. */
#ifndef TP_SAMPLES_H
#define TP_SAMPLES_H

#include "plan/plan.h"

/* The indices, ascending, of the first and of the last entry of each pattern of names,
 * and of every small replicated one: layers with equal shards may use what is
 * replicated beside them each in a way of its own. `out` has room for every entry. */
int tp_plan_samples(const tp_plan *plan, int *out, int *count, tp_error *err);

#endif
