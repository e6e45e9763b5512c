/* SPDX-License-Identifier: Apache-2.0 */
/* layout_cache.c -- one layout for all weights that are sharded alike. */
#include "layout/layout_cache.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"

typedef struct {
    uint64_t hash;
    tp_piece *pieces; /* in the arena */
    int count;
    tp_heads heads;
    const tp_layout *layout; /* NULL: free slot */
} slot;

struct tp_layout_cache {
    tp_arena *arena; /* borrowed */
    int ranks;
    slot *slots;
    size_t room; /* a power of two, at least twice the count */
    size_t count;
};

int
tp_layout_cache_new(tp_arena *arena, int ranks, tp_layout_cache **out, tp_error *err)
{
    *out = NULL;
    tp_layout_cache *layouts = calloc(1, sizeof(*layouts));
    if (layouts == NULL)
        return tp_fail_memory(err);
    *layouts = (tp_layout_cache){.arena = arena, .ranks = ranks, .room = 64};
    layouts->slots = calloc(layouts->room, sizeof(*layouts->slots));
    if (layouts->slots == NULL) {
        tp_layout_cache_free(layouts);
        return tp_fail_memory(err);
    }
    *out = layouts;
    return 0;
}

static uint64_t
hash_pieces(const tp_piece *pieces, int count, tp_heads heads)
{
    uint64_t hash = tp_hash_int(TP_HASH_START, heads.query);
    hash = tp_hash_int(hash, heads.key);
    for (int i = 0; i < count; i++) {
        hash = tp_hash_int(hash, pieces[i].size);
        hash = tp_hash_int(hash, pieces[i].unit);
        hash = tp_hash_int(hash, pieces[i].role);
    }
    return hash;
}

static bool
same_pieces(const slot *held, const tp_piece *pieces, int count, tp_heads heads)
{
    bool same = held->count == count && held->heads.query == heads.query &&
                held->heads.key == heads.key;
    for (int i = 0; same && i < count; i++)
        same = held->pieces[i].size == pieces[i].size &&
               held->pieces[i].unit == pieces[i].unit &&
               held->pieces[i].role == pieces[i].role;
    return same;
}

static int
grow(tp_layout_cache *layouts, tp_error *err)
{
    const size_t room = layouts->room * 2;
    slot *slots = calloc(room, sizeof(*slots));
    if (slots == NULL)
        return tp_fail_memory(err);
    for (size_t i = 0; i < layouts->room; i++) {
        if (layouts->slots[i].layout == NULL)
            continue;
        size_t at = (size_t)layouts->slots[i].hash & (room - 1);
        while (slots[at].layout != NULL)
            at = (at + 1) & (room - 1);
        slots[at] = layouts->slots[i];
    }
    free(layouts->slots);
    layouts->slots = slots;
    layouts->room = room;
    return 0;
}

int
tp_layout_cache_get(tp_layout_cache *layouts, const tp_piece *pieces, int count,
                    tp_heads heads, const tp_layout **out, tp_error *err)
{
    if (2 * layouts->count >= layouts->room && grow(layouts, err) < 0)
        return -1;
    const uint64_t hash = hash_pieces(pieces, count, heads);
    size_t at = (size_t)hash & (layouts->room - 1);
    while (layouts->slots[at].layout != NULL) {
        const slot *held = &layouts->slots[at];
        if (held->hash == hash && same_pieces(held, pieces, count, heads)) {
            *out = held->layout;
            return 0;
        }
        at = (at + 1) & (layouts->room - 1);
    }

    slot made = {hash, NULL, count, heads, NULL};
    if (tp_layout_new(layouts->arena, pieces, count, heads, layouts->ranks,
                      &made.layout, err) < 0)
        return -1;
    made.pieces =
        tp_arena_take(layouts->arena, (size_t)count, sizeof(*made.pieces), err);
    if (made.pieces == NULL)
        return -1;
    memcpy(made.pieces, pieces, (size_t)count * sizeof(*pieces));
    layouts->slots[at] = made;
    layouts->count++;
    *out = made.layout;
    return 0;
}

size_t
tp_layout_cache_count(const tp_layout_cache *layouts)
{
    return layouts->count;
}

void
tp_layout_cache_free(tp_layout_cache *layouts)
{
    if (layouts == NULL)
        return;
    free(layouts->slots);
    free(layouts);
}
