/* SPDX-License-Identifier: Apache-2.0 */
/* head_split.h -- which attention heads each rank has, also where they do not divide.
 *
 * A rank has full key/value heads with the query heads that attend to them. Where there
 * are fewer key/value heads than ranks, several ranks hold one and split its group of
 * query heads. */
#ifndef TP_HEAD_SPLIT_H
#define TP_HEAD_SPLIT_H

#include <stdint.h>

#include "base/error.h"

/* Head counts of an attention block; both 0 when no piece is QUERY or KEY. */
typedef struct {
    int64_t query;
    int64_t key;
} tp_heads;

/* The heads of one rank, and the ranks that share its key/value heads. */
typedef struct {
    int64_t query_start;
    int64_t query;
    int64_t key_start;
    int64_t key;
    int owner;
    int holders;
} tp_head_span;

/* Spread the heads over `ranks`; `spans` has room for as many. Full
 * key/value heads differ by at most one between ranks, and so do the query heads of
 * ranks that share one. Fails with TP_VALUE where a rank would get no query head, or
 * query heads do not fall into equal groups over key/value heads. */
int tp_head_split(tp_heads heads, int ranks, tp_head_span *spans, tp_error *err);

/* Query and key/value heads that `rank` holds. */
int tp_heads_of_rank(tp_heads heads, int ranks, int rank, tp_heads *out, tp_error *err);

#endif
