/* SPDX-License-Identifier: Apache-2.0 */
/* layout_cache.h -- one layout for all weights that are sharded alike.
 *
 * A model has thousands of weights and a handful of ways to shard them. Equal
 * pieces give the same pointer, so equal layouts are found by comparing pointers. */
#ifndef TP_LAYOUT_CACHE_H
#define TP_LAYOUT_CACHE_H

#include <stddef.h>

#include "layout/layout.h"

typedef struct tp_layout_cache tp_layout_cache;

/* The layouts live in `arena`, which is borrowed. */
int tp_layout_cache_new(tp_arena *arena, int ranks, tp_layout_cache **out,
                        tp_error *err);

/* As tp_layout_new, which is called once for equal arguments. */
int tp_layout_cache_get(tp_layout_cache *layouts, const tp_piece *pieces, int count,
                        tp_heads heads, const tp_layout **out, tp_error *err);

/* How many different layouts there are. */
size_t tp_layout_cache_count(const tp_layout_cache *layouts);

void tp_layout_cache_free(tp_layout_cache *layouts);

#endif
