/* SPDX-License-Identifier: Apache-2.0 */
/* family_blocks.h -- layers that are sharded in pairs because their names and sizes say
 * so.
 *
 * A block is sharded as one or not at all: the features that some layers give are those
 * that another takes. */
#ifndef TP_FAMILY_BLOCKS_H
#define TP_FAMILY_BLOCKS_H

#include "plan/plan_build.h"

/* Whether layers may be sharded because of what they are called: in models without
 * rules of partition_config or a preset, and of types that were tried or may be decided
 * by heuristics. */
bool tp_family_may_choose(const tp_build *build);

/* Choose for the layers of blocks of the family table that no rule speaks of, in models
 * without rules of partition_config or a preset. Fills `attentions` and `paired`.
 * Adds a message about a block whose sizes cannot be sharded. */
int tp_family_blocks_choose(tp_build *build, tp_error *err);

#endif
