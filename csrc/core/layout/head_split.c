/* SPDX-License-Identifier: Apache-2.0 */
/* head_split.c -- which attention heads each rank has. */
#include "layout/head_split.h"

#include <stdlib.h>

#include "layout/split.h"

static int
check_heads(tp_heads heads, int ranks, tp_error *err)
{
    const long long query = heads.query, key = heads.key;
    if (query <= 0 || key <= 0)
        return tp_fail(err, TP_VALUE,
                       "%lld query and %lld key/value heads are no head counts", query,
                       key);
    if (query % key != 0)
        return tp_fail(err, TP_VALUE,
                       "%lld query heads do not fall into equal groups over %lld "
                       "key/value heads",
                       query, key);
    if (query < ranks)
        return tp_fail(err, TP_VALUE,
                       "%lld query heads cannot be spread over %d ranks: a rank would "
                       "get none",
                       query, ranks);
    return 0;
}

/* Full key/value heads, each with the group of query heads that attends to it. */
static int
span_whole_groups(tp_heads heads, int ranks, tp_head_span *spans, int64_t *widths,
                  tp_error *err)
{
    if (tp_split(heads.key, 1, ranks, widths, err) < 0)
        return -1;
    const int64_t group = heads.query / heads.key;
    int64_t start = 0;
    for (int rank = 0; rank < ranks; rank++) {
        const int64_t key = widths[rank];
        spans[rank] = (tp_head_span){start * group, key * group, start, key, rank, 1};
        start += key;
    }
    return 0;
}

/* One key/value head on several ranks, which shard its group of query heads. The
 * group is never smaller than its ranks, because there is a query head for
 * every rank and both are spread evenly. */
static int
span_shared_heads(tp_heads heads, int ranks, tp_head_span *spans, int64_t *widths,
                  tp_error *err)
{
    const int key_heads = (int)heads.key; /* fewer than ranks */
    const int64_t group = heads.query / heads.key;
    if (tp_split(ranks, 1, key_heads, widths, err) < 0)
        return -1;

    int64_t *query = widths + key_heads; /* of the ranks of one head */
    int owner = 0;
    for (int head = 0; head < key_heads; head++) {
        const int holders = (int)widths[head];
        if (tp_split(group, 1, holders, query, err) < 0)
            return -1;
        int64_t start = head * group;
        for (int i = 0; i < holders; i++) {
            spans[owner + i] = (tp_head_span){start, query[i], head, 1, owner, holders};
            start += query[i];
        }
        owner += holders;
    }
    return 0;
}

int
tp_head_split(tp_heads heads, int ranks, tp_head_span *spans, tp_error *err)
{
    if (check_heads(heads, ranks, err) < 0)
        return -1;
    int64_t *widths = calloc(2 * (size_t)ranks, sizeof(*widths));
    if (widths == NULL)
        return tp_fail_memory(err);
    const int result = heads.key >= ranks
                           ? span_whole_groups(heads, ranks, spans, widths, err)
                           : span_shared_heads(heads, ranks, spans, widths, err);
    free(widths);
    return result;
}

int
tp_heads_of_rank(tp_heads heads, int ranks, int rank, tp_heads *out, tp_error *err)
{
    if (rank < 0 || rank >= ranks)
        return tp_fail(err, TP_VALUE, "rank %d is not one of %d ranks", rank, ranks);
    tp_head_span *spans = calloc((size_t)ranks, sizeof(*spans));
    if (spans == NULL)
        return tp_fail_memory(err);
    const int result = tp_head_split(heads, ranks, spans, err);
    if (result == 0)
        *out = (tp_heads){spans[rank].query, spans[rank].key};
    free(spans);
    return result;
}
