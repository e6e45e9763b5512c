/* SPDX-License-Identifier: Apache-2.0 */
/* norms.h -- norms over features that are sharded.
 *
 * Between a column and a row a norm over all features needs those of all ranks. Its
 * weight stays replicated; what it works on is laid out like the weight beside it. */
#ifndef TP_NORMS_H
#define TP_NORMS_H

#include "plan/plan_build.h"

/* Whether a module of this name is a norm of queries or of keys. */
bool tp_norms_is_head(const char *leaf);

/* The sharded weight whose features `module` norms, or -1 where it norms none that are
 * sharded. */
int tp_norms_follow(const tp_build *build, int module);

/* Keep the gradients of such norms full, whatever a rule says: every rank works on
 * all features. */
int tp_norms_settle(tp_build *build, tp_error *err);

#endif
