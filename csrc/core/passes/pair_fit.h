/* SPDX-License-Identifier: Apache-2.0 */
/* pair_fit.h -- whether the sizes of layers are those of a block.
 *
 * Reads sizes and head counts; chooses nothing. */
#ifndef TP_PAIR_FIT_H
#define TP_PAIR_FIT_H

#include "plan/plan_build.h"
#include "rules/families.h"

/* One block of a model, its layers found. */
typedef struct {
    const tp_family_block *row;
    int output; /* modules */
    int inputs[TP_FAMILY_INPUTS];
    int count;
    int attention; /* the module whose heads are cut, or -1; filled by tp_pair_misfit */
} tp_pair_block;

/* The parameter "weight" of a module, or -1. */
int tp_pair_weight(const tp_build *build, int module);

/* NULL where the features that the inputs give are those that the output takes, in
 * heads that the ranks can share where they are heads; else what keeps the block whole.
 */
const char *tp_pair_misfit(const tp_build *build, tp_pair_block *at);

/* Equal pieces in which the features of a layer of the block lie. */
int tp_pair_pieces(const tp_build *build, const tp_pair_block *at, bool input);

#endif
