/* SPDX-License-Identifier: Apache-2.0 */
/* hash.c -- a 64-bit hash, the same on every machine. */
#include "base/hash.h"

#include <string.h>

/* 2^64 over the golden ratio: odd, and its bits are spread evenly. */
#define FACTOR UINT64_C(0x9e3779b97f4a7c15)

/* Eight bytes at a time, because a plan hashes megabytes of names. Both steps
 * can be undone, so two values never meet from the same `hash`. The product
 * moves bits upwards only; the shift brings them down again. */
static uint64_t
mix(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * FACTOR;
    return hash ^ (hash >> 32);
}

/* `size` bytes, at most eight, as a little-endian number. */
static uint64_t
read_word(const unsigned char *bytes, size_t size)
{
    uint64_t word = 0;
    memcpy(&word, bytes, size);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

uint64_t
tp_hash_int(uint64_t hash, int64_t value)
{
    return mix(hash, (uint64_t)value);
}

uint64_t
tp_hash_list(uint64_t hash, const int *values, int count)
{
    hash = tp_hash_int(hash, count);
    for (int i = 0; i < count; i++)
        hash = tp_hash_int(hash, values[i]);
    return hash;
}

uint64_t
tp_hash_bytes(uint64_t hash, const void *data, size_t size)
{
    const unsigned char *bytes = data;
    size_t left = size;
    for (; left >= 8; left -= 8, bytes += 8)
        hash = mix(hash, read_word(bytes, 8));
    if (left > 0)
        hash = mix(hash, read_word(bytes, left));
    return mix(hash, size);
}

uint64_t
tp_hash_text(uint64_t hash, const char *text)
{
    /* No text is -1 bytes long, which tells NULL from "". */
    return text == NULL ? tp_hash_int(hash, -1)
                        : tp_hash_bytes(hash, text, strlen(text));
}
