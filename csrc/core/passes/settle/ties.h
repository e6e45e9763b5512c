/* SPDX-License-Identifier: Apache-2.0 */
/* ties.h -- one decision for all names of one tensor. */
#ifndef TP_TIES_H
#define TP_TIES_H

#include "plan/plan_build.h"

/* Make the decisions over all names of each tied tensor agree: a name without a
 * rule follows one with a rule where that is possible; where two rules
 * contradict, the tensor stays replicated with a message, or fails with TP_VALUE
 * naming both when a rule of partition_config asks to shard it. */
int tp_ties_settle(tp_build *build, tp_error *err);

/* Carry the decision over a layer's bias to the other names of its tensor, which
 * are no layer's own (BERT's heads name their bias twice). */
int tp_ties_settle_biases(tp_build *build, tp_error *err);

#endif
