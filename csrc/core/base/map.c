/* SPDX-License-Identifier: Apache-2.0 */
/* map.c -- names to small integers. */
#include "base/map.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"

/* Without the key's size, because the slots of a large map are what takes the time. */
typedef struct {
    const char *key; /* borrowed; NULL: free slot */
    uint64_t hash;
    int value;
} slot;

struct tp_map {
    slot *slots;
    size_t room; /* a power of two, at least twice the count */
    size_t count;
};

/* The slots for `count` keys, at most half of them taken; 0: too many. */
static size_t
room_for(size_t count)
{
    if (count > SIZE_MAX / sizeof(slot) / 4)
        return 0;
    size_t room = 16;
    while (room < 2 * count)
        room *= 2;
    return room;
}

int
tp_map_new(size_t count, tp_map **out, tp_error *err)
{
    *out = NULL;
    const size_t room = room_for(count);
    if (room == 0)
        return tp_fail_memory(err);

    tp_map *map = calloc(1, sizeof(*map));
    if (map == NULL)
        return tp_fail_memory(err);
    map->room = room;
    map->slots = calloc(room, sizeof(*map->slots));
    if (map->slots == NULL) {
        tp_map_free(map);
        return tp_fail_memory(err);
    }
    *out = map;
    return 0;
}

/* The slot that holds the key, or the free one where it belongs. */
static slot *
probe(slot *slots, size_t room, const char *key, size_t size, uint64_t hash)
{
    size_t at = (size_t)hash & (room - 1);
    while (slots[at].key != NULL) {
        const slot *here = &slots[at];
        if (here->hash == hash && strncmp(here->key, key, size) == 0 &&
            here->key[size] == '\0')
            break;
        at = (at + 1) & (room - 1);
    }
    return &slots[at];
}

static int
grow(tp_map *map, tp_error *err)
{
    const size_t room = room_for(map->room);
    slot *slots = room == 0 ? NULL : calloc(room, sizeof(*slots));
    if (slots == NULL)
        return tp_fail_memory(err);

    for (size_t i = 0; i < map->room; i++) {
        const slot *old = &map->slots[i];
        if (old->key != NULL)
            *probe(slots, room, old->key, strlen(old->key), old->hash) = *old;
    }
    free(map->slots);
    map->slots = slots;
    map->room = room;
    return 0;
}

int
tp_map_add(tp_map *map, const char *key, int value, tp_error *err)
{
    if (map->count >= map->room / 2 && grow(map, err) < 0)
        return -1;

    const size_t size = strlen(key);
    const uint64_t hash = tp_hash_bytes(TP_HASH_START, key, size);
    slot *here = probe(map->slots, map->room, key, size, hash);
    if (here->key != NULL)
        return here->value;
    *here = (slot){.key = key, .hash = hash, .value = value};
    map->count++;
    return value;
}

int
tp_map_find(const tp_map *map, const char *key, size_t size)
{
    const uint64_t hash = tp_hash_bytes(TP_HASH_START, key, size);
    const slot *here = probe(map->slots, map->room, key, size, hash);
    return here->key == NULL ? -1 : here->value;
}

void
tp_map_free(tp_map *map)
{
    if (map == NULL)
        return;
    free(map->slots);
    free(map);
}
