/* SPDX-License-Identifier: Apache-2.0 */
/* layouts.h -- which TP, data-parallel and ZeRO sizes fit, the best first.
 *
 * The order: what fits in the memory before what does not; then the least communication
 * time for a sequence, that of a step to 0.01 ms over the sequences that all replicas
 * train on in it; then more data-parallel ranks; then the lower stage of ZeRO. What
 * does not fit is in the order of the bytes that it needs. */
#ifndef TP_LAYOUTS_H
#define TP_LAYOUTS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "base/text.h"

typedef struct {
    int tp;
    int64_t replicas;
    int stage;
    int64_t bytes;  /* that a rank needs at its peak */
    double seconds; /* of communication in a step */
} tp_candidate;

/* Write the indices of the candidates to `order`, best first, and how many fit to
 * `fitting`. */
int tp_order_layouts(const tp_candidate *candidates, int count, int64_t memory,
                     int *order, int *fitting, tp_error *err);

/* Why `candidate` is where it is: add a sentence about it, the one before it, which is
 * NULL for the first, and the first one. */
void tp_layout_reason(tp_text *out, const tp_candidate *candidate,
                      const tp_candidate *before, const tp_candidate *first,
                      int64_t memory);

#endif
