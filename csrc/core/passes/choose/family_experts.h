/* SPDX-License-Identifier: Apache-2.0 */
/* family_experts.h -- experts whose tensors are sharded because names and sizes say so.
 *
 * All experts of a block are one tensor for each of their layers; each expert is
 * sharded like a pair of layers. */
#ifndef TP_FAMILY_EXPERTS_H
#define TP_FAMILY_EXPERTS_H

#include "plan/plan_build.h"

/* Choose for the tensors of experts of the family table that no rule speaks of, where
 * tp_family_may_choose allows it. Fills `stacked` and counts in `paired`. What does not
 * fit stays replicated. */
int tp_family_experts_choose(tp_build *build, tp_error *err);

#endif
