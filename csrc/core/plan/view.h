/* SPDX-License-Identifier: Apache-2.0 */
/* view.h -- a weight as [outer, size, inner] around the sharded dimension, and its
 * pieces.
 *
 * Holds the shape of a specification against the shape of a weight. Knows
 * nothing of ranks and heads. */
#ifndef TP_VIEW_H
#define TP_VIEW_H

#include "model/model.h"
#include "rules/spec.h"

typedef struct {
    int dim; /* dimension of the parameter that shrinks */
    int64_t outer;
    int64_t size; /* extent of the sharded dimension */
    int64_t inner;
    int count; /* pieces along the sharded dimension */
    int64_t piece[TP_MAX_PIECES];
} tp_view;

/* View `weight`, of which the parameter's dimension `dim` is to be sharded, as
 * the specification says. Fails with TP_VALUE saying which sizes do not fit. */
int tp_view_weight(const tp_spec *spec, const tp_parameter *weight, int dim,
                   tp_view *out, tp_error *err);

/* [outer, size, inner] of a 1-D bias that runs along the sharded dimension of
 * `weight`, from the weight's own `outer` and `inner`, which are replaced. */
void tp_view_bias(const tp_parameter *weight, int dim, int64_t *outer, int64_t *inner);

/* "[8, 16]"; `out` has room for TP_VIEW_SIZES bytes. */
#define TP_VIEW_SIZES (TP_MAX_DIMS * 22 + 3)
void tp_view_sizes(const int64_t *sizes, int dims, char *out);

#endif
