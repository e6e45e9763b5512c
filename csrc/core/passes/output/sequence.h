/* SPDX-License-Identifier: Apache-2.0 */
/* sequence.h -- where the tokens of a batch are sharded over the ranks.
 *
 * Between the blocks of a stack of layers every rank has a part of the tokens. They
 * come together where a block begins, at its inlet, and are sharded again where it
 * ends, at its outlet, which sums over the ranks anyway. */
#ifndef TP_SEQUENCE_H
#define TP_SEQUENCE_H

#include "plan/plan_build.h"

/* Find the stacks of the plan, where its options ask for them, and let the gradients be
 * summed of what is used on a part of the tokens.
 * TP_VALUE, naming the module, for a model that cannot be run that way. */
int tp_sequence_make(tp_build *build, tp_error *err);

#endif
