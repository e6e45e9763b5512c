/* SPDX-License-Identifier: Apache-2.0 */
/* pairs.h -- the set of neighbouring characters of a text, in 64 bits.
 *
 * Two pairs may share a bit. So a text whose set lacks a bit of another's does not
 * contain the other, while nothing follows where no bit is missing. That is
 * what makes twenty rules on a large model cheap: most patterns are ruled out
 * for most names by one comparison. */
#ifndef TP_PAIRS_H
#define TP_PAIRS_H

#include <stdint.h>

typedef uint64_t tp_pairs;

/* The set of "ab" alone. */
static inline tp_pairs
tp_pairs_of(char a, char b)
{
    /* The top bits of the product depend on all bits of both. */
    const uint32_t both = (uint32_t)(unsigned char)a << 8 | (unsigned char)b;
    return UINT64_C(1) << (both * UINT32_C(0x9e3779b1) >> 26);
}

#endif
