/* SPDX-License-Identifier: Apache-2.0 */
/* family_fit.h -- whether the sizes of layers are those of a block.
 *
 * Reads sizes and head counts; chooses nothing. */
#ifndef TP_FAMILY_FIT_H
#define TP_FAMILY_FIT_H

#include "plan/plan_build.h"
#include "rules/families.h"

/* One block of a model, its layers found. */
typedef struct {
    const tp_family_block *row;
    int output; /* modules */
    int inputs[TP_FAMILY_INPUTS];
    int count;
    int attention; /* the module whose heads are sharded, or -1; filled by
                    * tp_family_misfit
                    */
} tp_family_found;

/* The parameter "weight" of a module, or -1. */
int tp_family_weight(const tp_build *build, int module);

/* NULL where the features that the inputs give are those that the output takes, in
 * heads that the ranks can share where they are heads; else what keeps the block
 * replicated.
 */
const char *tp_family_misfit(const tp_build *build, tp_family_found *at);

/* Equal pieces in which the features of a layer of the block are. */
int tp_family_pieces(const tp_build *build, const tp_family_found *at, bool input);

#endif
