/* SPDX-License-Identifier: Apache-2.0 */
/* per_head.h -- tables and vectors with a value for each attention head.
 *
 * T5 learns what each head adds for each distance of two positions, a per-head table;
 * others learn how much each head attends to nothing, a per-head vector. Where the
 * heads are sharded, a rank needs the values of its own. */
#ifndef TP_PER_HEAD_H
#define TP_PER_HEAD_H

#include "plan/plan_build.h"

/* Shard both like the query heads where no rule speaks of them: tables in attention
 * that is sharded because of the names of its layers, vectors in any whose heads are
 * sharded. */
int tp_per_head_settle(tp_build *build, tp_error *err);

#endif
