/* SPDX-License-Identifier: Apache-2.0 */
/* few_heads.h -- attention with fewer heads than ranks, in a model that has more.
 *
 * A small tower beside a large model stays replicated where the plan of transformers
 * shards it. A rule of the user, and attention that holds much of the model, are
 * refused where its weights are resolved. */
#ifndef TP_FEW_HEADS_H
#define TP_FEW_HEADS_H

#include "plan/plan_build.h"

/* Replicate attention that cannot be sharded for want of heads, with a message for
 * modules that differ in indices only. Does nothing where it holds more than a tenth of
 * the parameters in all. */
int tp_few_heads_replicate(tp_build *build, tp_error *err);

#endif
