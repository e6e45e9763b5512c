/* SPDX-License-Identifier: Apache-2.0 */
/* plan_hash.h -- one hash of a plan, to compare it over ranks. */
#ifndef TP_PLAN_HASH_H
#define TP_PLAN_HASH_H

#include <stdint.h>

#include "plan/plan.h"

/* Covers what tp_plan_hash promises, and the layers with their flags. */
uint64_t tp_plan_hash_make(const tp_plan *plan);

#endif
