/* SPDX-License-Identifier: Apache-2.0 */
/* nothing_sharded.h -- a plan under which every rank would hold the full model. */
#ifndef TP_NOTHING_SHARDED_H
#define TP_NOTHING_SHARDED_H

#include "plan/plan_build.h"

/* Where the options insist that something is sharded: TP_VALUE, saying which rules to
 * write, for a plan that shards nothing. Under partition_config what only the defaults
 * shard does not count: they shard an embedding also where every pattern has a typo. */
int tp_nothing_sharded_refuse(tp_build *build, tp_error *err);

#endif
