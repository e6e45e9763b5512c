/* SPDX-License-Identifier: Apache-2.0 */
/* geometry.h -- head counts and head size of the attention modules of a model.
 *
 * Counts are read from integers that the modules and the configuration carry,
 * never from sizes of weights. Decides nothing about a weight. */
#ifndef TP_GEOMETRY_H
#define TP_GEOMETRY_H

#include <stdbool.h>

#include "layout/layout.h"
#include "model/model.h"

/* The NULL-terminated keys under which the counts are found. */
extern const char *const tp_geometry_query_keys[];
extern const char *const tp_geometry_key_keys[];
extern const char *const tp_geometry_group_keys[];

typedef struct {
    tp_heads heads;
    int64_t head_size;
    bool separate_keys; /* a layer of its own makes the keys: there is no fused q|k|v.
                         * False where that cannot be told from the queries. */
    bool latent;  /* keys and values are made from a latent: what has features of heads
                   * is longer than head_size says. */
    bool guessed; /* the counts have names that are not known: head_counts.h */
} tp_geometry;

typedef struct tp_geometries tp_geometries;

/* `model` is borrowed for the life of the geometries. */
int tp_geometries_new(const tp_model *model, tp_geometries **out, tp_error *err);

/* The module whose heads `module` works on: its parent where that is an
 * attention module (it has a head size or a head count itself), or the
 * grandparent where the parent only wraps this one. -1: none. */
int tp_geometries_find(const tp_geometries *geometries, int module);

/* NULL unless `module` is an attention module. */
const tp_geometry *tp_geometries_at(const tp_geometries *geometries, int module);

/* Take `module` for an attention module, with what was guessed of it. */
void tp_geometries_set(tp_geometries *geometries, int module,
                       const tp_geometry *guessed);

/* Whether the fused q|k|v weight of a module called `leaf` holds them head
 * by head (or group by group) in models of this type. */
bool tp_geometry_interleaved(const char *model_type, const char *leaf);

void tp_geometries_free(tp_geometries *geometries);

#endif
