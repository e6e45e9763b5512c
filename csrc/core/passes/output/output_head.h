/* SPDX-License-Identifier: Apache-2.0 */
/* output_head.h -- the layer that keeps its shard of the logits. */
#ifndef TP_OUTPUT_HEAD_H
#define TP_OUTPUT_HEAD_H

#include "plan/plan_build.h"

/* Find the layer that may keep its shard of the logits in training with labels: the
 * output head, sharded along the vocabulary, one run on each rank. TP_VALUE, with the
 * reason, where the options insist on one and there is none. */
int tp_output_head_find(tp_build *build, tp_error *err);

#endif
