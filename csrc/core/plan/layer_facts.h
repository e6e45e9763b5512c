/* SPDX-License-Identifier: Apache-2.0 */
/* layer_facts.h -- what follows from a layer of a plan.
 *
 * Read by the conversion of modules and by the self-check, so that neither derives it.
 */
#ifndef TP_LAYER_FACTS_H
#define TP_LAYER_FACTS_H

#include "model/names.h"
#include "plan/plan.h"

/* Which features of its sharded dimension each rank has. */
typedef struct {
    int64_t size;            /* of all ranks; 0: none are sharded */
    const tp_layout *layout; /* NULL: `run`, which every rank has */
    tp_run run;
} tp_features;

/* Of attention these are heads, of TP_ROPE the run of its output that all heads use. */
void tp_layer_features(const tp_plan *plan, int layer, tp_features *out);

/* Whether every rank has the layer's full output. */
bool tp_layer_has_full_output(const tp_layer *layer);

/* Whether a rank uses the layer's weight outside of its forward only if it is gathered.
 */
bool tp_layer_gathers_weight(const tp_layer *layer);

/* Whether it is sharded because of names or sizes alone, together with others or as
 * experts, in a model of a type that was not tried. */
bool tp_layer_is_heuristic(const tp_plan *plan, int layer);

/* What to plan anew where this layer turns out wrong: the module that holds it, if
 * every layer sharded below that is a direct child; else the sharded layers beside it,
 * which a larger module would hold with many others. Indices are `*`. The names are in
 * `arena`. */
int tp_layer_block(const tp_plan *plan, int layer, tp_arena *arena, tp_names *out,
                   tp_error *err);

#endif
