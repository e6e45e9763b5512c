/* SPDX-License-Identifier: Apache-2.0 */
/* pair_experts.h -- experts whose tensors are cut because names and sizes say so.
 *
 * All experts of a block are one tensor for each of their layers; each expert is cut
 * like a pair of layers. */
#ifndef TP_PAIR_EXPERTS_H
#define TP_PAIR_EXPERTS_H

#include "plan/plan_build.h"

/* Choose for the tensors of experts of the family table that no rule speaks of, where
 * tp_pair_may allows it. Fills `stacked` and counts in `paired`. What does not fit
 * stays whole. */
int tp_pair_experts_choose(tp_build *build, tp_error *err);

#endif
