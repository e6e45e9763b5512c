/* SPDX-License-Identifier: Apache-2.0 */
/* defaults.h -- what happens where no rule speaks.
 *
 * A default never decides over a tensor that a rule decides over under another
 * name, and it never fails: what it does not fit stays replicated. */
#ifndef TP_DEFAULTS_H
#define TP_DEFAULTS_H

#include "plan/plan_build.h"

/* Choose for input embedding and output heads, where partition_config or a preset is
 * given, and where no rule at all is but blocks of the family table were found. A
 * transformers plan says itself what happens to them. */
int tp_defaults_choose(tp_build *build, tp_error *err);

/* Choose for norms over one head that are in an attention module with a column
 * layer, and for the scalar of an activation beside one, and decide. Their gradient
 * is partial on each rank, because each works on the rank's own heads or features
 * only. */
int tp_defaults_inside(tp_build *build, tp_error *err);

#endif
