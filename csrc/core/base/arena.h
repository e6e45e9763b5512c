/* SPDX-License-Identifier: Apache-2.0 */
/* arena.h -- memory that is given back all at once.
 *
 * A plan and a model description are built once and never change, so their
 * pieces share one lifetime. Nothing taken from an arena is freed alone. */
#ifndef TP_ARENA_H
#define TP_ARENA_H

#include <stddef.h>

#include "base/error.h"

typedef struct tp_arena tp_arena;

int tp_arena_new(tp_arena **out, tp_error *err);

/* Zeroed memory, aligned for any type, or NULL with `err` filled. */
void *tp_arena_take(tp_arena *arena, size_t count, size_t size, tp_error *err);

/* A NUL-terminated copy of `size` bytes, or NULL with `err` filled. */
char *tp_arena_text(tp_arena *arena, const char *data, size_t size, tp_error *err);

void tp_arena_free(tp_arena *arena);

#endif
