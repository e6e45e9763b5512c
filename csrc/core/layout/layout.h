/* SPDX-License-Identifier: Apache-2.0 */
/* layout.h -- which runs of a sharded dimension each rank holds.
 *
 * A weight is seen as [outer, dim, inner] around the sharded dimension. A rank's
 * shard is the concatenation of its runs along `dim`. The one form covers
 * contiguous shards, fused weights (one run per piece) and key/value heads that
 * several ranks hold together. */
#ifndef TP_LAYOUT_H
#define TP_LAYOUT_H

#include <stdint.h>

#include "base/arena.h"
#include "base/error.h"
#include "layout/head_split.h"

/* What a piece of a fused weight is; a plain weight is one piece. */
typedef enum {
    TP_PIECE_PLAIN, /* sharded in grains */
    TP_PIECE_UNITS, /* sharded in units that are not split */
    TP_PIECE_QUERY, /* query heads: follow the key/value heads they attend to */
    TP_PIECE_KEY    /* key or value heads: shared when there are fewer than ranks */
} tp_piece_role;

typedef struct {
    int64_t size; /* elements along the sharded dimension */
    int64_t unit; /* grain, unit, or head size */
    tp_piece_role role;
} tp_piece;

typedef struct {
    int64_t start;  /* first element along the sharded dimension */
    int64_t length; /* > 0 */
    int owner;      /* lowest rank that holds this run */
    int holders;    /* ranks owner .. owner + holders - 1 hold it */
} tp_run;

typedef struct {
    const tp_run *runs;
    int count;
    int64_t width; /* sum of the lengths */
} tp_shard;

typedef struct {
    int64_t size; /* full extent of the sharded dimension */
    int ranks;
    const tp_shard *shards; /* one per rank */
} tp_layout;

/* Lay `count` pieces, which follow one another along the sharded dimension, over
 * `ranks`. Neighbouring runs of one rank are joined where they have the same
 * holders. The result lives in `arena`. Every rank gets at least one head, unit or
 * grain of every piece; when that cannot be, fails with TP_VALUE saying how
 * many there are. Key/value heads: as many ranks as heads or fewer, each rank
 * takes full heads with the query heads that attend to them; more ranks than
 * heads, the ranks are spread over the heads and those of one head shard its
 * query heads among them. */
int tp_layout_new(tp_arena *arena, const tp_piece *pieces, int count, tp_heads heads,
                  int ranks, const tp_layout **out, tp_error *err);

#endif
