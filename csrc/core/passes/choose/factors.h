/* SPDX-License-Identifier: Apache-2.0 */
/* factors.h -- factors of adapters, sharded as their layers.
 *
 * Of LoRA's factors the one that stands on the sharded side of its layer is sharded,
 * into the same runs: lora_B of a column layer, lora_A of a row layer. */
#ifndef TP_FACTORS_H
#define TP_FACTORS_H

#include "plan/plan_build.h"

/* Give every factor the choice of its layer, whatever rules say of it, and the copies
 * of modules that are trained in full none: see settle/copies.h. */
int tp_factors_choose(tp_build *build, tp_error *err);

#endif
