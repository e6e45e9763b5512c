/* SPDX-License-Identifier: Apache-2.0 */
/* embedding_lookup.c -- lookups on a CPU, and the arguments of the kernel. */
#include "pack/embedding_lookup.h"

#include <string.h>

tp_lookup
tp_lookup_make(const void *weight, void *found, int64_t tokens, int64_t row_bytes)
{
    tp_lookup lookup = {0};
    lookup.copy.from = weight;
    lookup.copy.to = found;
    lookup.copy.from_pitch = row_bytes;
    lookup.copy.to_pitch = row_bytes;
    lookup.copy.rows = tokens;
    lookup.copy.row_bytes = row_bytes;
    const uintptr_t bits =
        (uintptr_t)weight | (uintptr_t)found | (uintptr_t)row_bytes | TP_COPY_WORD;
    lookup.copy.word = (int32_t)(bits & (~bits + 1)); /* its lowest bit */
    return lookup;
}

int64_t
tp_lookup_outside(const tp_lookup *lookup)
{
    for (int64_t token = 0; token < lookup->copy.rows; token++)
        if (tp_lookup_row(lookup, token) == TP_LOOKUP_OUTSIDE)
            return token;
    return -1;
}

void
tp_lookup_on_cpu(const tp_lookup *lookup, int64_t begin, int64_t end)
{
    const size_t bytes = (size_t)lookup->copy.row_bytes;
    const char *weight = lookup->copy.from;
    char *found = (char *)lookup->copy.to + begin * lookup->copy.row_bytes;
    for (int64_t token = begin; token < end; token++, found += bytes) {
        const int64_t row = tp_lookup_row(lookup, token);
        if (row >= 0)
            memcpy(found, weight + (size_t)row * bytes, bytes);
        else
            memset(found, 0, bytes);
    }
}
