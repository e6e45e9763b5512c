/* SPDX-License-Identifier: Apache-2.0 */
/* reshard.c -- which pieces of old shards make a new one. */
#include "layout/reshard.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

/* A run of an old shard, and where it is in that shard. */
typedef struct {
    int64_t start;
    int64_t end;
    int64_t offset;
    int rank;
} held;

static int
check_runs(tp_run_list list, const char *whose, int rank, tp_error *err)
{
    int64_t width = 0;
    if (list.count < 0 || list.count % 2 != 0)
        return tp_fail(err, TP_VALUE,
                       "%s %d: %d values, expected pairs of start and length", whose,
                       rank, list.count);
    for (int i = 0; i < list.count; i += 2) {
        const int64_t start = list.values[i], length = list.values[i + 1];
        int64_t end = 0;
        if (start < 0 || length <= 0 || __builtin_add_overflow(start, length, &end) ||
            __builtin_add_overflow(width, length, &width))
            return tp_fail(err, TP_VALUE, "%s %d: run of %lld elements from %lld on",
                           whose, rank, (long long)length, (long long)start);
    }
    return 0;
}

static int
by_start_and_rank(const void *left, const void *right)
{
    const held *a = left, *b = right;
    if (a->start != b->start)
        return a->start < b->start ? -1 : 1;
    return (a->rank > b->rank) - (a->rank < b->rank);
}

/* All runs of the old shards, by their starts. */
static int
collect(const tp_run_list *sources, int ranks, held **out, int *count, tp_error *err)
{
    size_t total = 0;
    for (int rank = 0; rank < ranks; rank++) {
        if (check_runs(sources[rank], "old rank", rank, err) < 0)
            return -1;
        total += (size_t)sources[rank].count / 2;
    }
    held *runs = calloc(total + 1, sizeof(*runs));
    if (runs == NULL)
        return tp_fail_memory(err);
    int used = 0;
    for (int rank = 0; rank < ranks; rank++) {
        int64_t offset = 0;
        for (int i = 0; i < sources[rank].count; i += 2) {
            const int64_t start = sources[rank].values[i];
            const int64_t length = sources[rank].values[i + 1];
            runs[used++] = (held){start, start + length, offset, rank};
            offset += length;
        }
    }
    qsort(runs, (size_t)used, sizeof(*runs), by_start_and_rank);
    *out = runs;
    *count = used;
    return 0;
}

/* The run with element `at`, of the lowest rank that has it, or NULL. */
static const held *
find(const held *runs, int count, int64_t at)
{
    const held *found = NULL;
    for (int i = 0; i < count && runs[i].start <= at; i++)
        if (at < runs[i].end && (found == NULL || runs[i].rank < found->rank))
            found = &runs[i];
    return found;
}

/* Where the run that is read from `at` on ends, or a lower rank's begins. */
static int64_t
end_of(const held *runs, int count, const held *read, int64_t at)
{
    int64_t end = read->end;
    for (int i = 0; i < count && runs[i].start < end; i++)
        if (runs[i].rank < read->rank && runs[i].start > at)
            end = runs[i].start;
    return end;
}

static int
append(tp_reshard_copy **copies, int *count, int *room, tp_reshard_copy copy,
       tp_error *err)
{
    tp_reshard_copy *last = *count > 0 ? &(*copies)[*count - 1] : NULL;
    if (last != NULL && last->rank == copy.rank &&
        last->from + last->length == copy.from && last->to + last->length == copy.to) {
        last->length += copy.length;
        return 0;
    }
    if (*count == *room) {
        const int more = *room * 2 + 8;
        tp_reshard_copy *grown = realloc(*copies, (size_t)more * sizeof(*grown));
        if (grown == NULL)
            return tp_fail_memory(err);
        *copies = grown;
        *room = more;
    }
    (*copies)[(*count)++] = copy;
    return 0;
}

int
tp_reshard(const tp_run_list *sources, int ranks, tp_run_list target,
           tp_reshard_copy **copies, int *count, tp_error *err)
{
    int result = -1, held_count = 0, made = 0, room = 0;
    int64_t to = 0;
    held *runs = NULL;
    tp_reshard_copy *list = NULL;
    if (check_runs(target, "new shard", 0, err) < 0 ||
        collect(sources, ranks, &runs, &held_count, err) < 0)
        goto done;
    for (int i = 0; i < target.count; i += 2) {
        const int64_t stop = target.values[i] + target.values[i + 1];
        for (int64_t at = target.values[i]; at < stop;) {
            const held *read = find(runs, held_count, at);
            if (read == NULL) {
                tp_fail(err, TP_VALUE,
                        "no old rank holds element %lld of the new shard",
                        (long long)at);
                goto done;
            }
            const int64_t end = end_of(runs, held_count, read, at);
            const int64_t length = (end < stop ? end : stop) - at;
            const tp_reshard_copy copy = {read->rank, read->offset + (at - read->start),
                                          to, length};
            if (append(&list, &made, &room, copy, err) < 0)
                goto done;
            at += length;
            to += length;
        }
    }
    *copies = list;
    *count = made;
    list = NULL;
    result = 0;
done:
    free(runs);
    free(list);
    return result;
}
