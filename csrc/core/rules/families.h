/* SPDX-License-Identifier: Apache-2.0 */
/* families.h -- the blocks that models are made of, recognised by the names of layers.
 *
 * Data only. A row names the layers that give the features of a block and the one that
 * takes them; family_blocks.c looks for them and holds their sizes against each other.
 */
#ifndef TP_FAMILIES_H
#define TP_FAMILIES_H

#include <stdbool.h>

enum { TP_FAMILY_INPUTS = 3 };

/* Names are seen from the module that holds all layers of the block: "self.query". */
typedef struct {
    const char *output;                   /* sharded in rows */
    const char *inputs[TP_FAMILY_INPUTS]; /* sharded in columns; NULL behind the last */
    bool heads;             /* the features are heads of an attention module */
    const char *model_type; /* only in models of this type; NULL: in any */
    int groups; /* the heads are in so many equal groups, each with its own fused q|k|v;
                 * 0: they do not */
} tp_family_block;

/* How a module holds its experts. */
typedef enum {
    TP_EXPERT_TENSORS, /* tensors of its own: [experts, out, in], or turned */
    TP_EXPERT_MODULES, /* the tensors called "weight" of modules in it */
    TP_EXPERT_STACKS /* tensors [experts * features, hidden], which its parent views */
} tp_expert_form;

typedef struct {
    const char *output;
    const char *inputs[TP_FAMILY_INPUTS]; /* NULL behind the last */
    tp_expert_form form;
    const char *model_type; /* as above */
    bool turns; /* gate and up of one input take turns; or else one follows the other */
} tp_family_experts;

extern const tp_family_experts tp_family_experts_rows[];
extern const int tp_family_experts_count;

/* What is special to a model type comes first, and more inputs before fewer. */
extern const tp_family_block tp_family_blocks[];
extern const int tp_family_block_count;

/* Whether models of this type were tried with these blocks; in others they are a
 * heuristic that has to be tried. NULL: unknown. */
bool tp_family_is_tried(const char *model_type);

/* Whether attention in models of this type is given something for each head that is
 * made outside of it: a position bias. Not known of a type that was never tried. */
bool tp_family_gives_heads(const char *model_type);

/* Whether a module of that leaf name within attention drops what all heads are given.
 */
bool tp_family_drops_shared(const char *leaf);

#endif
