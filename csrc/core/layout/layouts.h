/* SPDX-License-Identifier: Apache-2.0 */
/* layouts.h -- one layout for all weights that are sharded alike.
 *
 * A model has thousands of weights and a handful of ways to shard them. Equal
 * pieces give the same pointer, so equal layouts are found by comparing pointers. */
#ifndef TP_LAYOUTS_H
#define TP_LAYOUTS_H

#include <stddef.h>

#include "layout/layout.h"

typedef struct tp_layouts tp_layouts;

/* The layouts live in `arena`, which is borrowed. */
int tp_layouts_new(tp_arena *arena, int ranks, tp_layouts **out, tp_error *err);

/* As tp_layout_new, which is called once for equal arguments. */
int tp_layouts_get(tp_layouts *layouts, const tp_piece *pieces, int count,
                   tp_heads heads, const tp_layout **out, tp_error *err);

/* How many different layouts there are. */
size_t tp_layouts_count(const tp_layouts *layouts);

void tp_layouts_free(tp_layouts *layouts);

#endif
