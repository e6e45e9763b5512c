/* SPDX-License-Identifier: Apache-2.0 */
/* fallback.h -- modules with full activations, whatever the rules say.
 *
 * What the self-check found to differ is planned anew. Individual: every linear layer
 * under the module is individually sharded and gathers its output or splits a full
 * input, so that what is between the layers sees what one process sees. Replicated: no
 * parameter under it is sharded. Of neither a gradient is summed. */
#ifndef TP_FALLBACK_H
#define TP_FALLBACK_H

#include "plan/plan_build.h"

/* Replicate the parameters under the modules of the options' `replicated`, with every
 * other name of their tensors. Fails with TP_VALUE for a name that no module has. */
int tp_fallback_replicate(tp_build *build, tp_error *err);

/* The same for one parameter. */
void tp_fallback_replicate_tensor(tp_build *build, int parameter);

/* Shard the layers under the modules of the options' `individual` individually; what is
 * no layer is replicated there. Fails as tp_fallback_replicate. */
int tp_fallback_individual(tp_build *build, tp_error *err);

#endif
