/* SPDX-License-Identifier: Apache-2.0 */
/* siblings.h -- column layers that are likely to be given one and the same input.
 *
 * They share the sum of its gradient over the ranks. Whether they are given the same
 * tensor is seen when they run; this only says whom to wait for. */
#ifndef TP_SIBLINGS_H
#define TP_SIBLINGS_H

#include "plan/plan_build.h"

/* Fill the siblings of every column layer of the plan: those with as many input
 * features in the same block, which is the nearest module around that holds a row
 * layer, too, or is a member of a list. q, k and v are siblings, gate and up are, also
 * inside of wrappers such as adapters. */
int tp_siblings_make(tp_build *build, tp_error *err);

#endif
