/* SPDX-License-Identifier: Apache-2.0 */
/* head_tables.h -- tables with a column for each head, inside of attention.
 *
 * T5 learns what each head adds for each distance of two positions. Where the heads
 * are cut, a rank needs the columns of its own. */
#ifndef TP_HEAD_TABLES_H
#define TP_HEAD_TABLES_H

#include "plan_build.h"

/* Cut such tables like the query heads, in attention that is cut because of the names
 * of its layers and where no rule speaks of them. Comes after all weights are resolved.
 */
int tp_head_tables_settle(tp_build *build, tp_error *err);

#endif
