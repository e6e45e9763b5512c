/* SPDX-License-Identifier: Apache-2.0 */
/* local_integers.h -- the integers of attention modules that become local.
 *
 * A forward that divides the hidden size by a number of heads needs the number
 * of this rank's heads. */
#ifndef TP_LOCAL_INTEGERS_H
#define TP_LOCAL_INTEGERS_H

#include "plan/plan_build.h"

/* Fill the plan's local integers from the decisions. Fails with TP_VALUE where a
 * rank's query heads do not fall into equal groups over its key/value heads. */
int tp_local_integers_make(tp_build *build, tp_error *err);

#endif
