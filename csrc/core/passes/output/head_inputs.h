/* SPDX-License-Identifier: Apache-2.0 */
/* head_inputs.h -- attention that is given something for each head from outside.
 *
 * A position bias is made once for all heads and handed to every attention module;
 * where the heads are sharded, each rank takes the part of its own. */
#ifndef TP_HEAD_INPUTS_H
#define TP_HEAD_INPUTS_H

#include "plan/plan_build.h"

/* For each module the layout of its query heads, in heads, where it may be given such a
 * thing and its heads are sharded; else NULL. `out` has room for one per module. */
int tp_head_inputs_find(tp_build *build, const tp_layout **out, tp_error *err);

#endif
