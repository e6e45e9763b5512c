/* SPDX-License-Identifier: Apache-2.0 */
/* hash.h -- a 64-bit FNV-1a hash, the same on every machine.
 *
 * Ranks compare it to see that they made the same plan; it is no defence
 * against an attacker. http://www.isthe.com/chongo/tech/comp/fnv/ */
#ifndef TP_HASH_H
#define TP_HASH_H

#include <stddef.h>
#include <stdint.h>

#define TP_HASH_START UINT64_C(0xcbf29ce484222325)

uint64_t tp_hash_bytes(uint64_t hash, const void *data, size_t size);

/* Mixes the value in as eight little-endian bytes. */
uint64_t tp_hash_int(uint64_t hash, int64_t value);

/* Mixes the bytes and the length in, so that "ab","c" differs from "a","bc".
 * NULL differs from "". */
uint64_t tp_hash_text(uint64_t hash, const char *text);

#endif
