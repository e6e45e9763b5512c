/* SPDX-License-Identifier: Apache-2.0 */
/* copy.cu -- moves the tiles of a list of copies, one block for each tile.
 *
 * The list travels as a kernel argument: nothing is allocated, nothing is waited for,
 * and a graph that captures the launch holds the list. No reduction, so the result is
 * the same bits whatever the order. */
#include "cuda/copy.h"

#include "cuda/launch.h"

namespace
{

/* The largest kernel argument is 32764 bytes; most launches need far less of it. */
constexpr int kFew = 8;
constexpr int kMany = 500;

static_assert(TP_COPY_THREADS * TP_COPY_WIDE == 1 << TP_COPY_WIDE_BITS, "a wide tile");
static_assert(TP_COPY_THREADS * TP_COPY_NARROW == 1 << TP_COPY_NARROW_BITS,
              "a narrow one");

template <int kRoom>
struct Batch {
    int32_t count;
    tp_copy copies[kRoom];
};

/* The loads are not cached beyond need: no byte is read twice. They are coherent, which
 * moves inside of one tensor need. */
template <bool kInOrder, typename Word, int kHeld>
__device__ __forceinline__ void
move(const tp_copy &copy, int64_t index)
{
    const tp_tile tile = tp_copy_tile(&copy, index);
    const char *from = static_cast<const char *>(copy.from) + tile.from;
    char *to = static_cast<char *>(copy.to) + tile.to;
    Word held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        const int32_t at = i * TP_COPY_THREADS + static_cast<int32_t>(threadIdx.x);
        if (at < tile.words)
            held[i] = __ldcs(reinterpret_cast<const Word *>(
                from + tp_tile_word(&tile, copy.from_pitch, sizeof(Word), at)));
    }
    if (kInOrder)
        __syncthreads(); /* all of the tile is read */
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        const int32_t at = i * TP_COPY_THREADS + static_cast<int32_t>(threadIdx.x);
        if (at < tile.words)
            __stcs(reinterpret_cast<Word *>(
                       to + tp_tile_word(&tile, copy.to_pitch, sizeof(Word), at)),
                   held[i]);
    }
}

template <bool kInOrder>
__device__ __forceinline__ void
move_words(const tp_copy &copy, int64_t index)
{
    switch (copy.word) {
        case 16:
            return move<kInOrder, uint4, TP_COPY_WIDE>(copy, index);
        case 8:
            return move<kInOrder, uint2, TP_COPY_NARROW>(copy, index);
        case 4:
            return move<kInOrder, uint32_t, TP_COPY_NARROW>(copy, index);
        case 2:
            return move<kInOrder, uint16_t, TP_COPY_NARROW>(copy, index);
        default:
            return move<kInOrder, uint8_t, TP_COPY_NARROW>(copy, index);
    }
}

template <int kRoom>
__global__ void
__launch_bounds__(TP_COPY_THREADS)
    copy_kernel(const Batch<kRoom> __grid_constant__ batch)
{
    const int32_t tile = static_cast<int32_t>(blockIdx.x);
    const tp_copy &copy = *tp_copy_find(batch.copies, batch.count, tile);
    move_words<false>(copy, tile - copy.first_tile);
}

/* A single block, so that a barrier orders all reads before all later writes. */
template <int kRoom>
__global__ void
__launch_bounds__(TP_COPY_THREADS)
    order_kernel(const Batch<kRoom> __grid_constant__ batch)
{
    for (int32_t i = 0; i < batch.count; i++) {
        const int64_t tiles = tp_copy_tiles(&batch.copies[i]);
        for (int64_t tile = 0; tile < tiles; tile++) {
            move_words<true>(batch.copies[i], tile);
            __syncthreads(); /* this tile is written where the next one may be read */
        }
    }
}

template <int kRoom>
cudaError_t
launch(const tp_copy *copies, int32_t count, int32_t tiles, bool in_order, void *stream)
{
    Batch<kRoom> batch;
    batch.count = count;
    for (int32_t i = 0; i < count; i++)
        batch.copies[i] = copies[i];
    if (in_order)
        return tp::launch(order_kernel<kRoom>, 1, TP_COPY_THREADS, stream, batch);
    return tp::launch(copy_kernel<kRoom>, tiles, TP_COPY_THREADS, stream, batch);
}

int
start(tp_copy *copies, int64_t count, bool in_order, void *stream)
{
    while (count > 0) {
        int32_t tiles = 0;
        const int32_t taken = tp_copy_count_tiles(copies, count, kMany, &tiles);
        if (taken == 0)
            return cudaErrorInvalidConfiguration; /* one copy of over 2^31 tiles */
        const cudaError_t error =
            taken <= kFew ? launch<kFew>(copies, taken, tiles, in_order, stream)
                          : launch<kMany>(copies, taken, tiles, in_order, stream);
        if (error != cudaSuccess)
            return error;
        copies += taken;
        count -= taken;
    }
    return cudaSuccess;
}

}  // namespace

extern "C" int
tp_copy_start(tp_copy *copies, int64_t count, void *stream)
{
    return start(copies, count, false, stream);
}

extern "C" int
tp_copy_start_in_order(tp_copy *copies, int64_t count, void *stream)
{
    return start(copies, count, true, stream);
}

extern "C" int
tp_copy_probe(void)
{
    cudaFuncAttributes unused;
    return tp::reported(cudaFuncGetAttributes(&unused, copy_kernel<kFew>));
}
