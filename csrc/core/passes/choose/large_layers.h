/* SPDX-License-Identifier: Apache-2.0 */
/* large_layers.h -- large layers that nothing else shards, individually sharded.
 *
 * Such a layer takes and gives full activations, so that what is around it is as in
 * one process. That costs an all-gather and an all-reduce where a pair of layers would
 * share them, and is worth it only for what is a part of the model that counts. */
#ifndef TP_LARGE_LAYERS_H
#define TP_LARGE_LAYERS_H

#include "plan/plan_build.h"

/* Choose for linear layers and embeddings that no rule and no block speaks of and that
 * are large together with those called alike, in models that a rule or a block shards.
 */
int tp_large_layers_choose(tp_build *build, tp_error *err);

#endif
