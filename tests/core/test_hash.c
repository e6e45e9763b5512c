/* SPDX-License-Identifier: Apache-2.0 */
#include "hash.h"

#include "check.h"

/* http://www.isthe.com/chongo/src/fnv/test_fnv.c */
static void
test_bytes_give_the_published_fnv_1a_values(void)
{
    CHECK(tp_hash_bytes(TP_HASH_START, "", 0) == TP_HASH_START);
    CHECK(tp_hash_bytes(TP_HASH_START, "a", 1) == UINT64_C(0xaf63dc4c8601ec8c));
    CHECK(tp_hash_bytes(TP_HASH_START, "foobar", 6) == UINT64_C(0x85944171f73967e8));
}

static void
test_bytes_may_come_in_parts(void)
{
    uint64_t hash = tp_hash_bytes(TP_HASH_START, "foo", 3);
    hash = tp_hash_bytes(hash, "bar", 3);
    CHECK(hash == tp_hash_bytes(TP_HASH_START, "foobar", 6));
}

static void
test_an_integer_is_eight_little_endian_bytes(void)
{
    const unsigned char bytes[] = {0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    CHECK(tp_hash_int(7, -2) == tp_hash_bytes(7, bytes, 8));
    const unsigned char large[] = {8, 7, 6, 5, 4, 3, 2, 1};
    CHECK(tp_hash_int(7, INT64_C(0x0102030405060708)) == tp_hash_bytes(7, large, 8));
}

static void
test_where_a_text_ends_counts(void)
{
    const uint64_t one = tp_hash_text(tp_hash_text(TP_HASH_START, "ab"), "c");
    const uint64_t other = tp_hash_text(tp_hash_text(TP_HASH_START, "a"), "bc");
    CHECK(one != other);
    CHECK(one != tp_hash_text(TP_HASH_START, "abc"));
}

static void
test_no_text_differs_from_an_empty_one(void)
{
    CHECK(tp_hash_text(TP_HASH_START, NULL) != tp_hash_text(TP_HASH_START, ""));
    CHECK(tp_hash_text(TP_HASH_START, NULL) != TP_HASH_START);
    CHECK(tp_hash_text(TP_HASH_START, "") != TP_HASH_START);
}

int
main(void)
{
    RUN(test_bytes_give_the_published_fnv_1a_values);
    RUN(test_bytes_may_come_in_parts);
    RUN(test_an_integer_is_eight_little_endian_bytes);
    RUN(test_where_a_text_ends_counts);
    RUN(test_no_text_differs_from_an_empty_one);
    return check_result();
}
