/* SPDX-License-Identifier: Apache-2.0 */
/* layers.h -- the modules of a plan whose forward changes. */
#ifndef TP_LAYERS_H
#define TP_LAYERS_H

#include "plan/plan_build.h"

/* Fill the plan's layers from the decisions, in the order of the modules. */
int tp_layers_make(tp_build *build, tp_error *err);

#endif
