/* SPDX-License-Identifier: Apache-2.0 */
/* per_head.h -- what attention holds for each of its heads.
 *
 * T5 learns what each head adds for each distance of two positions, a table with a
 * column for each head; others learn how much each head attends to nothing, a number
 * for each. Where the heads are cut, a rank needs those of its own. */
#ifndef TP_PER_HEAD_H
#define TP_PER_HEAD_H

#include "plan/plan_build.h"

/* Cut both like the query heads where no rule speaks of them: tables in attention that
 * is cut because of the names of its layers, numbers in any whose heads are cut. */
int tp_per_head_settle(tp_build *build, tp_error *err);

#endif
