/* SPDX-License-Identifier: Apache-2.0 */
/* rank_share.h -- how much of a model a rank holds, and what it holds in vain. */
#ifndef TP_RANK_SHARE_H
#define TP_RANK_SHARE_H

#include "base/text.h"
#include "plan/plan.h"

/* Parameters of the model; a tied one counts once. */
int64_t tp_plan_parameters(const tp_plan *plan);

/* The same of the shards on `rank`. */
int64_t tp_plan_rank_parameters(const tp_plan *plan, int rank);

/* A warning where some rank holds nearly everything, with the largest replicated
 * parameters and a rule that would shard them; nothing is added where all is well. */
int tp_plan_warn_replicated(const tp_plan *plan, tp_text *out, tp_error *err);

#endif
