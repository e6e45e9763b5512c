/* SPDX-License-Identifier: Apache-2.0 */
/* resolve.h -- what a chosen rule comes to for one parameter.
 *
 * Turns a specification, a shape and the head counts around it into a kind, a
 * view and a layout. Which rule is chosen is decided in choose/. */
#ifndef TP_RESOLVE_H
#define TP_RESOLVE_H

#include "plan/plan_build.h"

/* Fill the decision of `parameter`, which is no bias of a layer, from its
 * choice. Fails with TP_VALUE naming parameter, rule, sizes and what to do. */
int tp_resolve_parameter(tp_build *build, int parameter, tp_error *err);

/* Decide over all parameters but the biases of layers. */
int tp_resolve_weights(tp_build *build, tp_error *err);

/* Decide over the biases of layers, which follow their weights. */
int tp_resolve_biases(tp_build *build, tp_error *err);

#endif
