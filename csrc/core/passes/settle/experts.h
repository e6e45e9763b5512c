/* SPDX-License-Identifier: Apache-2.0 */
/* experts.h -- modules that hold the weights of all their experts as tensors.
 *
 * Each rank runs its shard of every expert, and the module's output is the sum over
 * the ranks. */
#ifndef TP_EXPERTS_H
#define TP_EXPERTS_H

#include "plan/plan_build.h"

/* Find the modules of experts that are sharded, fill `experts`, and decide over the
 * biases in them that no rule names. */
int tp_experts_settle(tp_build *build, tp_error *err);

/* The biases of a module of experts that are added to the sum: each rank adds its
 * share. Writes their indices to `out`, which may be NULL, and returns how many. */
int tp_experts_divided(const tp_build *build, int module, int *out);

/* The sharded weight of a module that is one layer of all experts, of which another
 * module is the other: the one gives features that are sharded, and the other takes
 * them. -1: it is none. */
int tp_experts_side(const tp_build *build, int module);

/* Whether a rule says that the module, inside of experts that are sharded, gives its
 * input back: each rank may give a share only, so that the sum is the whole. */
bool tp_experts_share(const tp_build *build, int module);

#endif
