/* SPDX-License-Identifier: Apache-2.0 */
/* rope.h -- the projection of latent attention that also makes positions.
 *
 * Its weight stays replicated. A column layer reads the latent part of its output, and
 * the heads of each rank read the last features, whose gradient is therefore partial.
 */
#ifndef TP_ROPE_H
#define TP_ROPE_H

#include "plan/plan_build.h"

/* Fill `out` and return 1 where a rule says that `module` is one, 0 where it is not.
 * Fails with TP_VALUE where it is unknown how many features are for positions. */
int tp_rope_layer(const tp_build *build, int module, tp_layer *out, tp_error *err);

#endif
