/* SPDX-License-Identifier: Apache-2.0 */
/* embedding_lookup.h -- rows of an embedding whose vocabulary is sharded.
 *
 * A token's row is copied where this rank holds it, and is 0 where another rank does.
 * Moves bytes, whatever their type. A row is moved once and nothing else is read, so
 * the least that a lookup moves is T rows written and T / R of them read, with T tokens
 * and R ranks. What a token comes to is worked out here for the kernel and for a CPU
 * alike. Knows nothing of torch or of CUDA. */
#ifndef TP_EMBEDDING_LOOKUP_H
#define TP_EMBEDDING_LOOKUP_H

#include "pack/copy.h"

/* What is in the place of a row that this rank does not hold. */
enum {
    TP_LOOKUP_ELSEWHERE = -1, /* another rank does */
    TP_LOOKUP_OUTSIDE = -2    /* the id is outside of the vocabulary */
};

typedef struct {
    tp_copy copy;       /* from the weight to what is found: `copy.rows` tokens, rows
                         * without gaps; on a CPU the word is not read */
    const void *ids;    /* borrowed; one for each token */
    int64_t start;      /* the id of this rank's first row */
    int64_t rows;       /* of this rank */
    int64_t vocabulary; /* rows of all ranks */
    int32_t id_bytes;   /* 4 or 8; ids are signed */
} tp_lookup;

static inline TP_HOST_DEVICE int64_t
tp_lookup_id(const tp_lookup *lookup, int64_t token)
{
    if (lookup->id_bytes == 4)
        return ((const int32_t *)lookup->ids)[token];
    return ((const int64_t *)lookup->ids)[token];
}

/* The row of this rank's weight that a token has, or one of the two values above. */
static inline TP_HOST_DEVICE int64_t
tp_lookup_row(const tp_lookup *lookup, int64_t token)
{
    const int64_t id = tp_lookup_id(lookup, token);
    if (id < 0 || id >= lookup->vocabulary)
        return TP_LOOKUP_OUTSIDE;
    const int64_t row = id - lookup->start;
    if (row < 0 || row >= lookup->rows)
        return TP_LOOKUP_ELSEWHERE;
    return row;
}

/* The token of the first word of tile `index` of `lookup->copy`. Only a row that is
 * longer than a tile takes a division. */
static inline TP_HOST_DEVICE int64_t
tp_lookup_token(const tp_lookup *lookup, const tp_tile *tile, int64_t index)
{
    const int32_t rows = tp_copy_tile_rows(&lookup->copy);
    return rows > 0 ? index * rows : tile->to / lookup->copy.row_bytes;
}

/* Where the word at `index` of a tile goes, in bytes from the first one of what is
 * found, whose rows have no gaps. */
static inline TP_HOST_DEVICE int64_t
tp_lookup_to(const tp_lookup *lookup, const tp_tile *tile, int32_t index)
{
    return tile->to + (int64_t)index * lookup->copy.word;
}

/* Where it comes from, in bytes from the first one of the weight, or one of the two
 * values above. `token` is that of the tile's first word. */
static inline TP_HOST_DEVICE int64_t
tp_lookup_from(const tp_lookup *lookup, const tp_tile *tile, int64_t token,
               int32_t index)
{
    if (tile->words > tile->row_words)
        token += index / tile->row_words;
    const int64_t row = tp_lookup_row(lookup, token);
    if (row < 0)
        return row;
    return tp_lookup_to(lookup, tile, index) + (row - token) * lookup->copy.row_bytes;
}

#ifdef __cplusplus
extern "C" {
#endif

/* A lookup of `tokens` rows of `row_bytes` bytes, in the widest words that both
 * addresses and the size of a row allow. The rest is for the caller to fill in. */
tp_lookup tp_lookup_make(const void *weight, void *found, int64_t tokens,
                         int64_t row_bytes);

/* The first token whose id is outside of the vocabulary, or -1. The ids are on the
 * CPU. */
int64_t tp_lookup_outside(const tp_lookup *lookup);

/* Look up tokens [begin, end) on a CPU; every id is inside of the vocabulary. */
void tp_lookup_on_cpu(const tp_lookup *lookup, int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif

#endif
