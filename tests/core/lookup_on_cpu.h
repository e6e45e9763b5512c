/* SPDX-License-Identifier: Apache-2.0 */
/* lookup_on_cpu.h -- what embedding_lookup.cu does, on a CPU: the same tiles and words.
 */
#ifndef TP_EMBEDDING_LOOKUP_HOST_H
#define TP_EMBEDDING_LOOKUP_HOST_H

#include "check.h"
#include "pack/embedding_lookup.h"

static inline void
lookup_word_on_cpu(const tp_lookup *lookup, int64_t first, char *to)
{
    const size_t word = (size_t)lookup->copy.word;
    if ((uintptr_t)to % word != 0)
        CHECK(!"a store is not aligned to its word");
    if (first < 0) {
        memset(to, first == TP_LOOKUP_OUTSIDE ? 0xff : 0, word);
        return;
    }
    const char *from = (const char *)lookup->copy.from + first;
    if ((uintptr_t)from % word != 0)
        CHECK(!"a load is not aligned to its word");
    memcpy(to, from, word);
}

/* All tiles, the last one first. */
static inline void
start_lookup_on_cpu(const tp_lookup *lookup)
{
    if (lookup->copy.rows == 0 || lookup->copy.row_bytes == 0)
        return;
    for (int64_t index = tp_copy_tiles(&lookup->copy) - 1; index >= 0; index--) {
        const tp_tile tile = tp_copy_tile(&lookup->copy, index);
        CHECK(tile.words > 0 &&
              tile.words <= 1 << tp_copy_tile_bits(lookup->copy.word));
        const int64_t token = tp_lookup_token(lookup, &tile, index);
        char *found = lookup->copy.to;
        for (int32_t i = 0; i < tile.words; i++)
            lookup_word_on_cpu(lookup, tp_lookup_from(lookup, &tile, token, i),
                               found + tp_lookup_to(lookup, &tile, i));
    }
}

#endif
