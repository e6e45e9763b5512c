/* SPDX-License-Identifier: Apache-2.0 */
/* copies.c -- runs to copies of words as wide as the addresses allow. */
#include "pack/copies.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

enum {
    /* Below this many bytes, narrow words cost less than the two more entries in the
     * list that the unaligned ends of rows take. */
    kWorthSplitting = 64 << 10
};

static int
add(tp_copies *list, const tp_copy *copy, tp_error *err)
{
    if (list->count == list->room) {
        const int64_t room = list->room == 0 ? 8 : 2 * list->room;
        tp_copy *items = realloc(list->items, (size_t)room * sizeof(*items));
        if (items == NULL)
            return tp_fail_memory(err);
        list->items = items;
        list->room = room;
    }
    list->items[list->count++] = *copy;
    return 0;
}

/* The largest power of two, up to the widest word, that divides `bits`. */
static int32_t
word_of(uintptr_t bits)
{
    const uintptr_t lowest = (bits | TP_COPY_WORD) & (~(bits | TP_COPY_WORD) + 1);
    return (int32_t)lowest;
}

/* What has to be a multiple of the word of both sides' rows. */
static uintptr_t
steps(const tp_copy *copy)
{
    return copy->rows > 1 ? (uintptr_t)copy->from_pitch | (uintptr_t)copy->to_pitch : 0;
}

/* Bytes [begin, end) of each row of `full`, in the widest words that they allow. */
static int
add_bytes(tp_copies *list, const tp_copy *full, int64_t begin, int64_t end,
          tp_error *err)
{
    if (begin == end)
        return 0;
    tp_copy part = *full;
    part.from = (const char *)full->from + begin;
    part.to = (char *)full->to + begin;
    part.row_bytes = end - begin;
    part.word = word_of((uintptr_t)part.from | (uintptr_t)part.to |
                        (uintptr_t)part.row_bytes | steps(full));
    return add(list, &part, err);
}

/* Add a copy; where both sides are off a wide word by the same bytes, its unaligned
 * ends become copies of their own. */
static int
add_strided(tp_copies *list, tp_copy copy, tp_error *err)
{
    if (copy.rows == 0 || copy.row_bytes == 0)
        return 0;
    if (copy.from_pitch == copy.row_bytes && copy.to_pitch == copy.row_bytes) {
        copy.row_bytes *= copy.rows;
        copy.rows = 1;
    }
    const int32_t wide =
        word_of(((uintptr_t)copy.from - (uintptr_t)copy.to) | steps(&copy));
    const int64_t head = (int64_t)((0 - (uintptr_t)copy.to) % (uintptr_t)wide);
    const int64_t body = (copy.row_bytes - head) / wide * wide;
    if (body <= 0 || copy.rows * copy.row_bytes < kWorthSplitting)
        return add_bytes(list, &copy, 0, copy.row_bytes, err);
    if (add_bytes(list, &copy, 0, head, err) < 0 ||
        add_bytes(list, &copy, head, head + body, err) < 0)
        return -1;
    return add_bytes(list, &copy, head + body, copy.row_bytes, err);
}

/* How many values, from `at` on, are runs that follow on one another; their length
 * in `length`. */
static int64_t
adjacent(const tp_shard_view *view, int64_t at, int64_t *length)
{
    int64_t next = at + 2;
    *length = view->runs[at + 1];
    while (next < view->values && view->runs[next] == view->runs[at] + *length) {
        *length += view->runs[next + 1];
        next += 2;
    }
    return next - at;
}

typedef enum { PACK, UNPACK, PACK_IN_ORDER } way;

/* One side of a copy: `at` bytes into each row of `pitch` bytes. */
typedef struct {
    int64_t at;
    int64_t pitch;
} side;

static tp_copy
directed(const tp_shard_view *view, const void *full, const void *shard, side in_full,
         side in_shard, way go)
{
    const char *a = (const char *)full + in_full.at;
    const char *b = (const char *)shard + in_shard.at;
    tp_copy copy = {.rows = view->outer, .word = 1};
    copy.from = go != UNPACK ? a : b;
    copy.to = (void *)(uintptr_t)(go != UNPACK ? b : a);
    copy.from_pitch = go != UNPACK ? in_full.pitch : in_shard.pitch;
    copy.to_pitch = go != UNPACK ? in_shard.pitch : in_full.pitch;
    return copy;
}

static int
add_view(tp_copies *list, const tp_shard_view *view, const void *full,
         const void *shard, way go, tp_error *err)
{
    const int64_t element = view->inner * view->item;
    const int64_t bytes = tp_shard_bytes(view);
    if (bytes == 0)
        return 0;

    side in_full = {0, view->size * element};
    side in_shard = {0, bytes / view->outer};
    int64_t length = 0;
    for (int64_t at = 0; at < view->values; in_shard.at += length * element) {
        in_full.at = view->runs[at] * element;
        at += adjacent(view, at, &length);
        tp_copy copy = directed(view, full, shard, in_full, in_shard, go);
        copy.row_bytes = length * element;
        if ((go == PACK_IN_ORDER ? add_bytes(list, &copy, 0, copy.row_bytes, err)
                                 : add_strided(list, copy, err)) < 0)
            return -1;
    }
    return 0;
}

int
tp_copies_pack(tp_copies *list, const tp_shard_view *view, const void *full,
               void *shard, tp_error *err)
{
    return add_view(list, view, full, shard, PACK, err);
}

int
tp_copies_unpack(tp_copies *list, const tp_shard_view *view, void *full,
                 const void *shard, tp_error *err)
{
    return add_view(list, view, full, shard, UNPACK, err);
}

int
tp_copies_in_order(tp_copies *list, const tp_shard_view *view, const void *full,
                   void *shard, tp_error *err)
{
    return add_view(list, view, full, shard, PACK_IN_ORDER, err);
}

void
tp_copies_clear(tp_copies *list)
{
    free(list->items);
    *list = (tp_copies)TP_NO_COPIES;
}
