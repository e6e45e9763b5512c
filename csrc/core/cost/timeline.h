/* SPDX-License-Identifier: Apache-2.0 */
/* timeline.h -- the most that is alive at once in a step, from what was alive in parts
 * of it.
 *
 * A part is what runs from one mark to the next: the forward of a block, or its
 * backward. One that is like another was traced once and is repeated. */
#ifndef TP_TIMELINE_H
#define TP_TIMELINE_H

#include <stdint.h>

#include "base/error.h"

/* Bytes above those at the start of the part. */
typedef struct {
    int64_t live;      /* that are no gradients of parameters */
    int64_t gradients; /* of parameters */
} tp_moment;

typedef struct {
    tp_moment end; /* what has come to be in the part, or less than 0 what has gone */
    const tp_moment *moments; /* those that no other of the part has both more of */
    int count;
    int repeats;
} tp_part;

/* The moment at which live + share * gradients is largest, the first of several;
 * `share` is that of its gradients which a rank keeps. */
tp_moment tp_timeline_peak(const tp_part *parts, int count, double share);

/* Bytes that a transformer keeps from its forward for its backward pass on one TP rank:
 * L s b h (10 + 24/t + 5 a s / (h t)), with recomputed attention scores, as kernels
 * that are fused keep none, L s b h (10 + 24/t), and all / t with the tokens sharded
 * between blocks; with activation checkpointing 2 L s b h. Of 16-bit values
 * (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
 * Models", table 2). */
typedef struct {
    int64_t layers, tokens, hidden; /* L, s b, h */
    int64_t ranks;                  /* t */
    int itemsize;
    int sequence_parallel, checkpointing;
} tp_formula_sizes;

/* Fails with TP_VALUE for sizes below 0 or no ranks, and for 2^63 bytes or more. */
int tp_activation_formula(const tp_formula_sizes *sizes, int64_t *bytes, tp_error *err);

#endif
