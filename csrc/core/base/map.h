/* SPDX-License-Identifier: Apache-2.0 */
/* map.h -- names to small integers.
 *
 * Open addressing over borrowed NUL-terminated keys, which outlive the map. */
#ifndef TP_MAP_H
#define TP_MAP_H

#include <stddef.h>

#include "base/error.h"

typedef struct tp_map tp_map;

/* Room for `count` keys without growing. */
int tp_map_new(size_t count, tp_map **out, tp_error *err);

/* Add `key`, which is borrowed, with a `value` that is not negative. Returns the
 * value that the key has now, which is another one when the key was there, or -1. */
int tp_map_add(tp_map *map, const char *key, int value, tp_error *err);

/* The value of the first `size` bytes of `key`, or -1. */
int tp_map_find(const tp_map *map, const char *key, size_t size);

void tp_map_free(tp_map *map);

#endif
