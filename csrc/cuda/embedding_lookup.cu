/* SPDX-License-Identifier: Apache-2.0 */
/* embedding_lookup.cu -- looks up rows, one block for each tile of what is found.
 *
 * The tiles and words are those of copy.h, and so are the reasons for their sizes. No
 * reduction, so the result is the same bits whatever the order. */
#include "cuda/embedding_lookup.h"

#include "cuda/launch.h"

namespace
{

/* Tiles are the grid's first dimension, which takes 2^31 - 1 blocks. */
constexpr int64_t kMostTiles = 2147483647;

/* Every byte `value`. */
template <typename Word>
__device__ __forceinline__ Word
filled(uint8_t value)
{
    Word word;
    memset(&word, value, sizeof(Word));
    return word;
}

/* Rows of frequent tokens are read again and again, so loads are cached as usual; what
 * is found is read next, by the sum over the ranks. */
template <typename Word, int kHeld>
__global__ void
__launch_bounds__(TP_COPY_THREADS)
    lookup_kernel(const tp_lookup __grid_constant__ lookup)
{
    const int64_t index = blockIdx.x;
    const tp_tile tile = tp_copy_tile(&lookup.copy, index);
    const int64_t token = tp_lookup_token(&lookup, &tile, index);
    const char *weight = static_cast<const char *>(lookup.copy.from);
    char *found = static_cast<char *>(lookup.copy.to);
    int64_t from[kHeld];
    Word held[kHeld];
    /* All ids are on their way before the first row is. */
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        const int32_t at = i * TP_COPY_THREADS + static_cast<int32_t>(threadIdx.x);
        if (at < tile.words)
            from[i] = tp_lookup_from(&lookup, &tile, token, at);
    }
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        const int32_t at = i * TP_COPY_THREADS + static_cast<int32_t>(threadIdx.x);
        if (at < tile.words)
            held[i] = from[i] >= 0
                          ? *reinterpret_cast<const Word *>(weight + from[i])
                          : filled<Word>(from[i] == TP_LOOKUP_OUTSIDE ? 0xff : 0);
    }
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        const int32_t at = i * TP_COPY_THREADS + static_cast<int32_t>(threadIdx.x);
        if (at < tile.words)
            *reinterpret_cast<Word *>(found + tp_lookup_to(&lookup, &tile, at)) =
                held[i];
    }
}

template <typename Word, int kHeld>
cudaError_t
launch(const tp_lookup &lookup, int64_t tiles, void *stream)
{
    return tp::launch(lookup_kernel<Word, kHeld>, tiles, TP_COPY_THREADS, stream,
                      lookup);
}

}  // namespace

extern "C" int
tp_lookup_start(const tp_lookup *lookup, void *stream)
{
    if (lookup->copy.rows == 0 || lookup->copy.row_bytes == 0)
        return cudaSuccess;
    const int64_t tiles = tp_copy_tiles(&lookup->copy);
    if (tiles > kMostTiles)
        return cudaErrorInvalidConfiguration;
    switch (lookup->copy.word) {
        case 16:
            return launch<uint4, TP_COPY_WIDE>(*lookup, tiles, stream);
        case 8:
            return launch<uint2, TP_COPY_NARROW>(*lookup, tiles, stream);
        case 4:
            return launch<uint32_t, TP_COPY_NARROW>(*lookup, tiles, stream);
        case 2:
            return launch<uint16_t, TP_COPY_NARROW>(*lookup, tiles, stream);
        default:
            return launch<uint8_t, TP_COPY_NARROW>(*lookup, tiles, stream);
    }
}
