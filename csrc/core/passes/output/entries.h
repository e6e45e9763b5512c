/* SPDX-License-Identifier: Apache-2.0 */
/* entries.h -- the entries of a plan: what was decided over each parameter. */
#ifndef TP_ENTRIES_H
#define TP_ENTRIES_H

#include "plan/plan_build.h"

/* Fill the plan's entries. All names of a tensor have the decision of the first. */
int tp_entries_make(tp_build *build, tp_error *err);

#endif
