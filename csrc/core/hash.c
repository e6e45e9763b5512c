/* SPDX-License-Identifier: Apache-2.0 */
/* hash.c -- a 64-bit FNV-1a hash, the same on every machine. */
#include "hash.h"

#include <string.h>

#define FNV_PRIME UINT64_C(0x100000001b3)

uint64_t
tp_hash_bytes(uint64_t hash, const void *data, size_t size)
{
    const unsigned char *bytes = data;
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ bytes[i]) * FNV_PRIME;
    return hash;
}

uint64_t
tp_hash_int(uint64_t hash, int64_t value)
{
    const uint64_t bits = (uint64_t)value;
    unsigned char bytes[8];
    for (int i = 0; i < 8; i++)
        bytes[i] = (unsigned char)(bits >> (8 * i));
    return tp_hash_bytes(hash, bytes, sizeof(bytes));
}

uint64_t
tp_hash_text(uint64_t hash, const char *text)
{
    /* No text is -1 bytes long, which tells NULL from "". */
    if (text == NULL)
        return tp_hash_int(hash, -1);
    const size_t size = strlen(text);
    return tp_hash_int(tp_hash_bytes(hash, text, size), (int64_t)size);
}
