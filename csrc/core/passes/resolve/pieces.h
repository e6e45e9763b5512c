/* SPDX-License-Identifier: Apache-2.0 */
/* pieces.h -- what the pieces of a viewed weight are: heads, units or plain.
 *
 * The only place where a size is held against head counts. */
#ifndef TP_PIECES_H
#define TP_PIECES_H

#include "plan/plan_build.h"
#include "plan/view.h"

typedef struct {
    tp_piece piece[TP_MAX_PIECES];
    int count;
    tp_heads heads; /* as tp_layout_new wants them */
    int attention;  /* module whose heads are sharded; -1: none */
    bool shards_keys;
} tp_pieces;

/* Name the pieces of `view` for a weight of `module` that is sharded as `spec` says.
 * Fails with TP_VALUE where equal pieces would split heads. */
int tp_pieces_make(const tp_build *build, int module, const tp_spec *spec,
                   const tp_view *view, tp_pieces *out, tp_error *err);

/* Whether a parameter of this name holds a gate and what it gates. */
bool tp_pieces_paired(const char *leaf);

/* As tp_pieces_make, for a parameter that is no layer's weight: `attention` is the
 * module whose heads it may follow, or -1; `experts`: it is one of experts. */
void tp_pieces_raw(const tp_build *build, const tp_parameter *parameter, int attention,
                   const tp_view *view, bool experts, tp_pieces *out);

#endif
