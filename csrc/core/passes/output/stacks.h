/* SPDX-License-Identifier: Apache-2.0 */
/* stacks.h -- lists of layers, and what is where in their blocks.
 *
 * A stack is a list of modules whose names are indices, its layers, of which some
 * module holds a row layer or experts. It is the outermost such list: experts may be
 * one inside of it. A row layer that splits its input is given full activations, and so
 * closes no block. */
#ifndef TP_STACKS_H
#define TP_STACKS_H

#include "plan/plan_build.h"

enum { TP_HOLDS_ROW = 1, TP_IS_ROW };

/* One of each per module. */
typedef struct {
    const tp_build *build;
    int *numbered; /* the outermost module with an index for a name that it is or is
                    * inside of, or -1 */
    char *rows;    /* TP_HOLDS_ROW, TP_IS_ROW, or 0 */
    bool *columns; /* it is a column layer or holds one */
    bool *lists;   /* its modules with an index for a name are the layers of a stack */
} tp_stacks;

/* Find the stacks of a plan whose layers are made; `count` is how many. */
int tp_stacks_find(const tp_build *build, tp_stacks *stacks, int *count, tp_error *err);
void tp_stacks_clear(tp_stacks *stacks);

/* Whether a layer is or belongs to experts whose tensors are sharded. */
bool tp_stacks_are_experts(const tp_layer *layer);

int tp_stacks_parent(const tp_stacks *stacks, int module);

/* Whether a module is a norm whose vectors are replicated. */
bool tp_stacks_is_norm(const tp_stacks *stacks, int module);

/* The layer of a stack that a module is or is inside of, or -1. */
int tp_stacks_layer(const tp_stacks *stacks, int module);

/* Whether a module is behind the row layer of a block, as its bias and its wrapper
 * do: below `top` something around it holds a row layer and no column layer. */
bool tp_stacks_is_behind_row(const tp_stacks *stacks, int module, int top);

/* Where the tokens come together for a column layer. A block may take the sizes of its
 * views from its input, so that is the nearest module around that holds the row layer,
 * too, unless its columns have a module of their own there: BERT's attention ends in
 * another one, which adds the residual. */
int tp_stacks_gather_input(const tp_stacks *stacks, const tp_layer *column);

/* The child of its layer of a stack, or of a layer inside of it, that a module is or is
 * inside of. */
int tp_stacks_block(const tp_stacks *stacks, int module);

#endif
