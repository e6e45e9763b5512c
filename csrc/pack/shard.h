/* SPDX-License-Identifier: Apache-2.0 */
/* shard.h -- copy the runs of a shard out of a full tensor, and write them back.
 *
 * Works on raw memory of any element size; never sees torch, never allocates
 * the tensors, never starts a thread. The caller splits the bytes of the shard
 * among threads as it likes: the result is the same. */
#ifndef TP_SHARD_H
#define TP_SHARD_H

#include <stdint.h>

#include "core/base/error.h"

/* Where a shard is in its full tensor, which is contiguous and seen as [outer, size,
 * inner] around the sharded dimension: the runs along `size`, one after the other. */
typedef struct {
    int64_t outer;
    int64_t size;
    int64_t inner;
    int64_t item;        /* bytes per element; not read by the checks */
    const int64_t *runs; /* borrowed: start, length, start, length, ... */
    int64_t values;      /* how many values `runs` has, two per run */
} tp_shard_view;

/* Whether the view holds `full_items` elements, every run is inside the sharded
 * dimension, and the runs fill exactly `shard_items` elements. Fails with TP_VALUE
 * naming the run and the size. What passes is safe to pack. */
int tp_shard_check(const tp_shard_view *view, int64_t full_items, int64_t shard_items,
                   tp_error *err);

/* Whether no two runs share an element, so that unpacking does not depend on
 * the order of writes. Called after tp_shard_check. Fails with TP_VALUE. */
int tp_shard_disjoint(const tp_shard_view *view, tp_error *err);

/* Bytes of the shard of a checked view. */
int64_t tp_shard_bytes(const tp_shard_view *view);

/* Tell the kernel that `bytes` bytes at `memory`, freshly allocated, are about to
 * be filled. An optimisation only: nothing depends on whether it is heard. */
void tp_shard_expect(void *memory, int64_t bytes);

/* Copy bytes [begin, end) of the shard out of the full tensor. */
void tp_shard_pack(const tp_shard_view *view, const void *full, void *shard,
                   int64_t begin, int64_t end);

/* Copy bytes [begin, end) of the shard to `part`, of which they are the first. */
void tp_shard_part(const tp_shard_view *view, const void *full, void *part,
                   int64_t begin, int64_t end);

/* Copy bytes [begin, end) of the shard to their places in the full tensor. */
void tp_shard_unpack(const tp_shard_view *view, void *full, const void *shard,
                     int64_t begin, int64_t end);

/* Copy what of the shard belongs into bytes [begin, end) of the full tensor to
 * `window`, of which they are the first. */
void tp_shard_unpack_window(const tp_shard_view *view, void *window, const void *shard,
                            int64_t begin, int64_t end);

#endif
