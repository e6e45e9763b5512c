/* SPDX-License-Identifier: Apache-2.0 */
/* regions.h -- where ranks work on activations that are sharded.
 *
 * A sharded region is between a column layer and the row layer behind it. Random
 * numbers are drawn for a rank's own features there, and elsewhere for what all ranks
 * have. */
#ifndef TP_REGIONS_H
#define TP_REGIONS_H

#include "plan/plan_build.h"

/* Fill which layers of the plan open and close a region, the modules in whose forward
 * that is, and the dropouts that are given other activations than their place says. */
int tp_regions_make(tp_build *build, tp_error *err);

#endif
