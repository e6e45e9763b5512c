/* SPDX-License-Identifier: Apache-2.0 */
/* sequence.h -- where the tokens of a batch are sharded over the ranks.
 *
 * Between the blocks of a stack of layers every rank has a shard of the tokens. They
 * are gathered where a block begins and reduce-scattered where it ends, by its row
 * layer, which sums over the ranks anyway. */
#ifndef TP_SEQUENCE_H
#define TP_SEQUENCE_H

#include "plan/plan_build.h"

/* Find the stacks of the plan, where its options ask for them, and let the gradients be
 * summed of what is used on own tokens alone.
 * TP_VALUE, naming the module, for a model that cannot be run that way. */
int tp_sequence_make(tp_build *build, tp_error *err);

#endif
