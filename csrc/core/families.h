/* SPDX-License-Identifier: Apache-2.0 */
/* families.h -- the blocks that models are made of, recognised by the names of layers.
 *
 * Data only. A row names the layers that give the features of a block and the one that
 * takes them; pair.c looks for them and holds their sizes against each other. */
#ifndef TP_FAMILIES_H
#define TP_FAMILIES_H

#include <stdbool.h>

enum { TP_FAMILY_INPUTS = 3 };

/* Names are seen from the module that holds all layers of the block: "self.query". */
typedef struct {
    const char *output;                   /* cut in rows */
    const char *inputs[TP_FAMILY_INPUTS]; /* cut in columns; NULL behind the last */
    bool heads;             /* the features are heads of an attention module */
    const char *model_type; /* only in models of this type; NULL: in any */
    int groups; /* the heads lie in so many equal groups, each with its own fused q|k|v;
                 * 0: they do not */
} tp_family_block;

/* What is special to a model type comes first, and more inputs before fewer. */
extern const tp_family_block tp_family_blocks[];
extern const int tp_family_block_count;

/* Whether models of this type were tried with these blocks; in others they are a guess
 * that has to be tried. NULL: unknown. */
bool tp_family_is_tried(const char *model_type);

/* Whether attention in models of this type is given something for each head that is
 * made outside of it: a position bias. Not known of a type that was never tried. */
bool tp_family_gives_heads(const char *model_type);

#endif
