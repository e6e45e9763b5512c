/* SPDX-License-Identifier: Apache-2.0 */
/* arena.c -- memory that is given back all at once. */
#include "base/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A description of a large model is a few MB; blocks that double up to this
 * keep both a small and a large one to a handful of allocations. */
#define FIRST_BLOCK ((size_t)4096)
#define LARGEST_BLOCK ((size_t)1 << 20)

/* No object is larger than half the address space; with this bound the sums
 * below cannot overflow. */
#define LARGEST_TAKE (SIZE_MAX / 2)

typedef struct block {
    struct block *next;
    size_t used;
    size_t room;
    _Alignas(max_align_t) unsigned char data[];
} block;

struct tp_arena {
    block *blocks; /* the newest first; only that one has room to give */
    size_t next_room;
};

int
tp_arena_new(tp_arena **out, tp_error *err)
{
    *out = calloc(1, sizeof(**out));
    if (*out == NULL)
        return tp_fail_memory(err);
    (*out)->next_room = FIRST_BLOCK;
    return 0;
}

/* A block of its own for what is larger than the next one would be. */
static block *
add_block(tp_arena *arena, size_t need)
{
    const size_t room = need > arena->next_room ? need : arena->next_room;
    block *added = calloc(1, sizeof(block) + room);
    if (added == NULL)
        return NULL;
    added->room = room;
    added->next = arena->blocks;
    arena->blocks = added;
    if (arena->next_room < LARGEST_BLOCK)
        arena->next_room *= 2;
    return added;
}

void *
tp_arena_take(tp_arena *arena, size_t count, size_t size, tp_error *err)
{
    const size_t align = _Alignof(max_align_t);
    size_t need;
    if (__builtin_mul_overflow(count, size, &need) || need > LARGEST_TAKE) {
        tp_fail_memory(err);
        return NULL;
    }
    need = (need + align - 1) / align * align;

    block *from = arena->blocks;
    if (from == NULL || from->room - from->used < need)
        from = add_block(arena, need);
    if (from == NULL) {
        tp_fail_memory(err);
        return NULL;
    }
    void *taken = from->data + from->used;
    from->used += need;
    return taken;
}

char *
tp_arena_text(tp_arena *arena, const char *data, size_t size, tp_error *err)
{
    if (size == SIZE_MAX) {
        tp_fail_memory(err);
        return NULL;
    }
    char *copy = tp_arena_take(arena, size + 1, 1, err);
    if (copy != NULL && size > 0)
        memcpy(copy, data, size);
    return copy;
}

void
tp_arena_free(tp_arena *arena)
{
    if (arena == NULL)
        return;
    block *next;
    for (block *each = arena->blocks; each != NULL; each = next) {
        next = each->next;
        free(each);
    }
    free(arena);
}
