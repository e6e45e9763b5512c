/* SPDX-License-Identifier: Apache-2.0 */
/* unmatched.h -- rules that match nothing, and layers that no rule matches. */
#ifndef TP_UNMATCHED_H
#define TP_UNMATCHED_H

#include "plan/plan_build.h"

/* A message for each rule that matched no name at all, with the nearest names. With
 * strict, a rule of partition_config is an error instead, and so is a preset of
 * which no row matched. Rules for other model types are left out. */
int tp_unmatched_rules(tp_build *build, tp_error *err);

/* With strict: fails with TP_VALUE when a linear layer has no rule, naming up
 * to five. */
int tp_unmatched_layers(tp_build *build, tp_error *err);

#endif
