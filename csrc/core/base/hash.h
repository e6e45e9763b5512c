/* SPDX-License-Identifier: Apache-2.0 */
/* hash.h -- a 64-bit hash, the same on every machine.
 *
 * Ranks compare it to see that they made the same plan, and maps find names by
 * it; it is no defence against an attacker. */
#ifndef TP_HASH_H
#define TP_HASH_H

#include <stddef.h>
#include <stdint.h>

#define TP_HASH_START UINT64_C(0xcbf29ce484222325)

/* Mixes the value in, whatever the byte order of the machine. */
uint64_t tp_hash_int(uint64_t hash, int64_t value);

/* Mixes the values and their number in, so that two lists in a row are not one. */
uint64_t tp_hash_list(uint64_t hash, const int *values, int count);

/* Mixes the bytes and their number in, so that "ab","c" differs from "a","bc". */
uint64_t tp_hash_bytes(uint64_t hash, const void *data, size_t size);

/* As tp_hash_bytes; NULL differs from "". */
uint64_t tp_hash_text(uint64_t hash, const char *text);

#endif
