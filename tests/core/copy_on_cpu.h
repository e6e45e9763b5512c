/* SPDX-License-Identifier: Apache-2.0 */
/* copy_on_cpu.h -- what copy.cu does, on a CPU: the same tiles, words and threads. */
#ifndef TP_COPY_ON_CPU_H
#define TP_COPY_ON_CPU_H

#include <stdlib.h>

#include "check.h"
#include "pack/copies.h"

enum { HELD = TP_COPY_THREADS * TP_COPY_NARROW };

/* One block: every thread loads all its words before any thread stores one. */
static inline void
copy_tile_on_cpu(const tp_copy *copy, int64_t index)
{
    unsigned char held[HELD][TP_COPY_WORD];
    const tp_tile tile = tp_copy_tile(copy, index);
    CHECK(tile.words > 0 && tile.words <= 1 << tp_copy_tile_bits(copy->word));
    const char *from = (const char *)copy->from + tile.from;
    char *to = (char *)copy->to + tile.to;
    for (int32_t i = 0; i < tile.words; i++) {
        const char *word = from + tp_tile_word(&tile, copy->from_pitch, copy->word, i);
        if ((uintptr_t)word % (uintptr_t)copy->word != 0)
            CHECK(!"a load is not aligned to its word");
        memcpy(held[i], word, (size_t)copy->word);
    }
    for (int32_t i = 0; i < tile.words; i++) {
        char *word = to + tp_tile_word(&tile, copy->to_pitch, copy->word, i);
        if ((uintptr_t)word % (uintptr_t)copy->word != 0)
            CHECK(!"a store is not aligned to its word");
        memcpy(word, held[i], (size_t)copy->word);
    }
}

/* All copies in launches of `room`, the tiles of a launch in an order that `seed`
 * picks; 0 is for their own order. */
static inline void
start_on_cpu(tp_copy *copies, int64_t count, int32_t room, unsigned seed)
{
    while (count > 0) {
        int32_t tiles = 0;
        const int32_t taken = tp_copy_count_tiles(copies, count, room, &tiles);
        /* A step that shares no factor with the tiles visits each of them once. */
        int64_t step = seed == 0 ? 1 : 2 * (int64_t)(seed % 50) + 1;
        while (tiles % step == 0 && step > 1)
            step += 2;
        int64_t tile = seed % (unsigned)tiles;
        unsigned char *seen = calloc((size_t)tiles, 1);
        for (int32_t i = 0; i < tiles; i++, tile = (tile + step) % tiles) {
            while (seen[tile])
                tile = (tile + 1) % tiles;
            seen[tile] = 1;
            const tp_copy *copy = tp_copy_find(copies, taken, (int32_t)tile);
            copy_tile_on_cpu(copy, tile - copy->first_tile);
        }
        free(seen);
        copies += taken;
        count -= taken;
    }
}

#endif
