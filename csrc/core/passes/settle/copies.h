/* SPDX-License-Identifier: Apache-2.0 */
/* copies.h -- copies of modules that are trained in full, sharded as the originals. */
#ifndef TP_COPIES_H
#define TP_COPIES_H

#include "plan/plan_build.h"

/* Give every parameter of a copy the decision of the original's, which is final by
 * then, whatever rules say of it. Fails with TP_VALUE where a copy is one tensor with a
 * name that is not sharded alike. */
int tp_copies_settle(tp_build *build, tp_error *err);

#endif
