/* SPDX-License-Identifier: Apache-2.0 */
/* layout.c -- which runs of a sharded dimension each rank holds. */
#include "layout/layout.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

#include "layout/head_split.h"
#include "layout/split.h"

static int
check_piece(const tp_piece *piece, tp_heads heads, tp_error *err)
{
    const long long size = piece->size, unit = piece->unit;
    if (size <= 0 || unit <= 0)
        return tp_fail(err, TP_VALUE, "a piece of size %lld in units of %lld", size,
                       unit);
    if (piece->role != TP_PIECE_QUERY && piece->role != TP_PIECE_KEY)
        return 0;
    const bool query = piece->role == TP_PIECE_QUERY;
    const int64_t count = query ? heads.query : heads.key;
    if (count <= 0 || size % unit != 0 || size / unit != count)
        return tp_fail(err, TP_VALUE, "size %lld is not %lld %s heads of %lld", size,
                       (long long)count, query ? "query" : "key/value", unit);
    return 0;
}

/* The run of every rank, counted from the start of the piece. */
static int
shard_by_size(const tp_piece *piece, int ranks, tp_run *runs, int64_t *widths,
              tp_error *err)
{
    const bool plain = piece->role == TP_PIECE_PLAIN;
    const int result =
        plain ? tp_split_grain(piece->size, piece->unit, ranks, widths, err)
              : tp_split(piece->size, piece->unit, ranks, widths, err);
    if (result < 0)
        return -1;
    int64_t start = 0;
    for (int rank = 0; rank < ranks; rank++) {
        if (widths[rank] == 0)
            return tp_fail(err, TP_VALUE,
                           "%lld units of %lld cannot be spread over %d ranks: a rank "
                           "would get none",
                           (long long)(piece->size / piece->unit),
                           (long long)piece->unit, ranks);
        runs[rank] = (tp_run){start, widths[rank], rank, 1};
        start += widths[rank];
    }
    return 0;
}

static void
shard_by_heads(const tp_piece *piece, const tp_head_span *spans, int ranks,
               tp_run *runs)
{
    const int64_t unit = piece->unit;
    for (int rank = 0; rank < ranks; rank++) {
        const tp_head_span *span = &spans[rank];
        if (piece->role == TP_PIECE_QUERY)
            runs[rank] =
                (tp_run){span->query_start * unit, span->query * unit, rank, 1};
        else
            runs[rank] = (tp_run){span->key_start * unit, span->key * unit, span->owner,
                                  span->holders};
    }
}

/* `runs` is [count][ranks], counted from the start of the dimension. */
static int
shard_pieces(const tp_piece *pieces, int count, tp_heads heads, int ranks, tp_run *runs,
             tp_error *err)
{
    int result = -1;
    bool by_heads = false;
    int64_t size = 0;
    for (int i = 0; i < count; i++) {
        if (check_piece(&pieces[i], heads, err) < 0)
            return -1;
        if (__builtin_add_overflow(size, pieces[i].size, &size))
            return tp_fail(err, TP_VALUE, "the sizes of %d pieces sum to 2^63 or more",
                           count);
        by_heads |= pieces[i].role == TP_PIECE_QUERY || pieces[i].role == TP_PIECE_KEY;
    }
    int64_t *widths = calloc((size_t)ranks, sizeof(*widths));
    tp_head_span *spans = calloc((size_t)ranks, sizeof(*spans));
    if (widths == NULL || spans == NULL) {
        tp_fail_memory(err);
        goto done;
    }
    if (by_heads && tp_head_split(heads, ranks, spans, err) < 0)
        goto done;

    int64_t offset = 0;
    for (int i = 0; i < count; i++) {
        tp_run *row = runs + (ptrdiff_t)i * ranks;
        const tp_piece_role role = pieces[i].role;
        if (role == TP_PIECE_QUERY || role == TP_PIECE_KEY)
            shard_by_heads(&pieces[i], spans, ranks, row);
        else if (shard_by_size(&pieces[i], ranks, row, widths, err) < 0)
            goto done;
        for (int rank = 0; rank < ranks; rank++)
            row[rank].start += offset;
        offset += pieces[i].size;
    }
    result = 0;
done:
    free(widths);
    free(spans);
    return result;
}

/* One rank's column of `runs`, neighbours joined. `out` has room for `count`. */
static tp_shard
join_runs(const tp_run *runs, int count, int ranks, int rank, tp_run *out)
{
    tp_shard shard = {out, 0, 0};
    for (int i = 0; i < count; i++) {
        const tp_run run = runs[(ptrdiff_t)i * ranks + rank];
        tp_run *last = shard.count > 0 ? &out[shard.count - 1] : NULL;
        shard.width += run.length;
        if (last != NULL && last->start + last->length == run.start &&
            last->owner == run.owner && last->holders == run.holders)
            last->length += run.length;
        else
            out[shard.count++] = run;
    }
    return shard;
}

int
tp_layout_new(tp_arena *arena, const tp_piece *pieces, int count, tp_heads heads,
              int ranks, const tp_layout **out, tp_error *err)
{
    if (ranks <= 0 || count <= 0)
        return tp_fail(err, TP_VALUE, "cannot lay %d pieces over %d ranks", count,
                       ranks);
    int result = -1;
    const size_t cells = (size_t)count * (size_t)ranks;
    tp_run *runs = calloc(cells, sizeof(*runs));
    if (runs == NULL)
        return tp_fail_memory(err);
    if (shard_pieces(pieces, count, heads, ranks, runs, err) < 0)
        goto done;

    tp_layout *layout = tp_arena_take(arena, 1, sizeof(*layout), err);
    tp_shard *shards = tp_arena_take(arena, (size_t)ranks, sizeof(*shards), err);
    tp_run *kept = tp_arena_take(arena, cells, sizeof(*kept), err);
    if (layout == NULL || shards == NULL || kept == NULL)
        goto done;
    for (int rank = 0; rank < ranks; rank++)
        shards[rank] =
            join_runs(runs, count, ranks, rank, kept + (ptrdiff_t)rank * count);
    for (int i = 0; i < count; i++)
        layout->size += pieces[i].size;
    layout->ranks = ranks;
    layout->shards = shards;
    *out = layout;
    result = 0;
done:
    free(runs);
    return result;
}
