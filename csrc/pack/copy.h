/* SPDX-License-Identifier: Apache-2.0 */
/* copy.h -- strided copies as tiles, in which a block of threads moves words.
 *
 * What a tile holds is worked out here for the kernel and for a CPU alike, so that the
 * tests run the very tiles that a GPU runs. Knows nothing of torch or of CUDA. */
#ifndef TP_COPY_H
#define TP_COPY_H

#include <stdint.h>

#include "core/base/host_device.h"

enum {
    /* Divides the threads that an SM holds on every architecture from 7.5 on; smaller
     * blocks would search the list more often. */
    TP_COPY_THREADS = 256,
    /* Words that a thread holds at once. Bytes on their way hide the latency of memory:
     * four words of 16 bytes are plenty, and of shorter ones it takes more. */
    TP_COPY_WIDE = 4,
    TP_COPY_NARROW = 8,
    TP_COPY_WIDE_BITS = 10, /* 256 * 4 */
    TP_COPY_NARROW_BITS = 11,
    TP_COPY_WORD = 16 /* the widest load there is */
};

/* `rows` rows of `row_bytes` bytes, which are not zero. */
typedef struct {
    const void *from; /* borrowed; on the device */
    void *to; /* borrowed; shares bytes with the source in moves in order alone */
    int64_t from_pitch; /* bytes from row to row */
    int64_t to_pitch;
    int64_t rows;
    int64_t row_bytes;
    int32_t word;       /* 1, 2, 4, 8 or 16; divides addresses, steps and row_bytes */
    int32_t first_tile; /* in a batch: the tiles of the copies before it */
} tp_copy;

/* Words of a tile. A word is at index `row * row_words + column` of its tile. */
typedef struct {
    int64_t from; /* bytes from the start of the copy's source to the first word */
    int64_t to;
    int32_t words;
    int32_t row_words; /* at least `words` where the tile lies inside of one row */
} tp_tile;

/* A tile holds 2 to this many words. Sizes that are powers of two are shifted by, since
 * a division takes a GPU as long as moving a word. */
static inline TP_HOST_DEVICE int32_t
tp_copy_tile_bits(int32_t word)
{
    return word == TP_COPY_WORD ? TP_COPY_WIDE_BITS : TP_COPY_NARROW_BITS;
}

static inline TP_HOST_DEVICE int64_t
tp_copy_row_words(const tp_copy *copy)
{
    const int32_t word = copy->word;
    return copy->row_bytes >> ((word >= 2) + (word >= 4) + (word >= 8) + (word >= 16));
}

/* Rows of a tile; 0 where a row is longer than a tile. */
static inline TP_HOST_DEVICE int32_t
tp_copy_tile_rows(const tp_copy *copy)
{
    const int64_t words = tp_copy_row_words(copy);
    const int32_t most = 1 << tp_copy_tile_bits(copy->word);
    return words > most ? 0 : most / (int32_t)words;
}

static inline TP_HOST_DEVICE int64_t
tp_copy_tiles(const tp_copy *copy)
{
    const int32_t bits = tp_copy_tile_bits(copy->word);
    const int64_t rows = tp_copy_tile_rows(copy);
    if (rows > 0)
        return (copy->rows + rows - 1) / rows;
    return ((tp_copy_row_words(copy) + (1 << bits) - 1) >> bits) * copy->rows;
}

/* What tile `tile`, counted from 0, holds. */
static inline TP_HOST_DEVICE tp_tile
tp_copy_tile(const tp_copy *copy, int64_t tile)
{
    const int64_t row_words = tp_copy_row_words(copy);
    const int32_t bits = tp_copy_tile_bits(copy->word);
    const int32_t most = 1 << bits;
    const int32_t rows = tp_copy_tile_rows(copy);
    tp_tile out;
    if (rows > 0) {
        const int64_t row = tile * rows;
        const int64_t left = copy->rows - row;
        out.from = row * copy->from_pitch;
        out.to = row * copy->to_pitch;
        out.row_words = (int32_t)row_words;
        out.words = (left < rows ? (int32_t)left : rows) * out.row_words;
        return out;
    }
    const int64_t across = (row_words + most - 1) >> bits;
    const int64_t row = copy->rows == 1 ? 0 : tile / across;
    const int64_t column = (tile - row * across) << bits;
    const int64_t left = row_words - column;
    out.from = row * copy->from_pitch + column * copy->word;
    out.to = row * copy->to_pitch + column * copy->word;
    out.row_words = most;
    out.words = left < most ? (int32_t)left : most;
    return out;
}

/* Where the word at `index` of a tile is from the tile's first word on, with rows
 * `pitch` bytes apart. */
static inline TP_HOST_DEVICE int64_t
tp_tile_word(const tp_tile *tile, int64_t pitch, int32_t word, int32_t index)
{
    if (tile->words <= tile->row_words)
        return (int64_t)index * word;
    const int32_t row = index / tile->row_words;
    return row * pitch + (int64_t)(index - row * tile->row_words) * word;
}

/* Count the tiles of the first copies of a list, at most `room` of them and no more
 * tiles than a launch takes; returns how many copies that is, and the tiles in `tiles`.
 */
static inline int32_t
tp_copy_count_tiles(tp_copy *copies, int64_t count, int32_t room, int32_t *tiles)
{
    int64_t total = 0;
    int32_t taken = 0;
    while (taken < room && taken < count) {
        const int64_t next = total + tp_copy_tiles(&copies[taken]);
        if (next > INT32_MAX)
            break;
        copies[taken++].first_tile = (int32_t)total;
        total = next;
    }
    *tiles = (int32_t)total;
    return taken;
}

/* The copy that a tile of a counted list belongs to. */
static inline TP_HOST_DEVICE const tp_copy *
tp_copy_find(const tp_copy *copies, int32_t count, int32_t tile)
{
    int32_t low = 0;
    int32_t high = count - 1;
    while (low < high) {
        const int32_t middle = (low + high + 1) / 2;
        if (copies[middle].first_tile <= tile)
            low = middle;
        else
            high = middle - 1;
    }
    return &copies[low];
}

#endif
