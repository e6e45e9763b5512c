/* SPDX-License-Identifier: Apache-2.0 */
/* fallback.h -- modules with whole activations, whatever the rules say.
 *
 * What was tried and found to be another model is planned anew. Apart: every linear
 * layer under the module is cut by itself, gathers its output or takes its part of a
 * whole input, so that what lies between the layers sees what one process sees. Whole:
 * no parameter under it is cut. Of neither a gradient is summed. */
#ifndef TP_FALLBACK_H
#define TP_FALLBACK_H

#include "plan/plan_build.h"

/* Leave the parameters under the modules of the options' `whole` whole, with every
 * other name of their tensors. Fails with TP_VALUE for a name that no module has. */
int tp_fallback_replicate(tp_build *build, tp_error *err);

/* Cut the layers under the modules of the options' `apart` by themselves; what is no
 * layer stays whole there.
 * Fails as tp_fallback_replicate. */
int tp_fallback_individual(tp_build *build, tp_error *err);

#endif
