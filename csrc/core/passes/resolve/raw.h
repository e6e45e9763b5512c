/* SPDX-License-Identifier: Apache-2.0 */
/* raw.h -- what a rule comes to for a parameter that is no layer's weight.
 *
 * Experts as one tensor [experts, out, in] or [experts, in, out], and vectors with one
 * element per head. A rule names a dimension of them, not a role: column the last but
 * one, row the last. */
#ifndef TP_RAW_H
#define TP_RAW_H

#include "plan/plan_build.h"

/* Whether the parameter is not the weight or bias of a linear or embedding module. */
bool tp_raw_is(const tp_model *model, int parameter);

/* Fill `out` for a raw parameter that `choice` shards. Fails with TP_VALUE. */
int tp_raw_resolve(tp_build *build, int parameter, const tp_choice *choice,
                   tp_decision *out, tp_error *err);

/* Give a raw parameter the same shards as `from` along its dimension `dim`, which has
 * the size that `from` is sharded along. */
void tp_raw_follow(tp_build *build, int parameter, int from, int dim);

#endif
