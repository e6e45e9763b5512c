/* SPDX-License-Identifier: Apache-2.0 */
#include "base/hash.h"

#include "check.h"

/* Worked out apart from the code, from its description. */
static void
test_the_values_are_the_same_on_every_machine(void)
{
    CHECK(tp_hash_int(TP_HASH_START, 1) == UINT64_C(0x5a8419103ebe48e4));
    CHECK(tp_hash_int(TP_HASH_START, -2) == UINT64_C(0x07446d361b3f5cc1));
    CHECK(tp_hash_bytes(TP_HASH_START, "", 0) == UINT64_C(0xf8bb92c91b3f5cc0));
    CHECK(tp_hash_bytes(TP_HASH_START, "model.layers.0.weight", 21) ==
          UINT64_C(0x5277fb7e70b7f266));
}

static void
test_eight_bytes_are_a_little_endian_integer(void)
{
    const unsigned char bytes[] = {8, 7, 6, 5, 4, 3, 2, 1};
    CHECK(tp_hash_bytes(7, bytes, 8) ==
          tp_hash_int(tp_hash_int(7, INT64_C(0x0102030405060708)), 8));
}

static void
test_bytes_that_are_zero_count(void)
{
    const unsigned char zeros[16] = {0};
    for (size_t i = 1; i <= sizeof(zeros); i++)
        CHECK(tp_hash_bytes(7, zeros, i) != tp_hash_bytes(7, zeros, i - 1));
}

static void
test_many_names_have_as_many_hashes_in_their_low_bits(void)
{
    enum { NAMES = 20000, SLOTS = 1 << 16 };
    static unsigned char seen[SLOTS];
    int most = 0;
    memset(seen, 0, sizeof(seen));
    for (int i = 0; i < NAMES; i++) {
        char name[40];
        snprintf(name, sizeof(name), "model.layers.%d.mlp.%d.weight", i / 100, i % 100);
        const uint64_t hash = tp_hash_text(TP_HASH_START, name);
        const int held = ++seen[hash % SLOTS];
        most = held > most ? held : most;
    }
    /* A random function puts about six into the fullest of them. */
    CHECK(most <= 10);
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
test_where_a_list_ends_counts(void)
{
    const int values[] = {1, 2, 3};
    const uint64_t one =
        tp_hash_list(tp_hash_list(TP_HASH_START, values, 2), values + 2, 1);
    const uint64_t other =
        tp_hash_list(tp_hash_list(TP_HASH_START, values, 1), values + 1, 2);
    CHECK(one != other);
    CHECK(one != tp_hash_list(TP_HASH_START, values, 3));
    CHECK(tp_hash_list(TP_HASH_START, NULL, 0) == tp_hash_int(TP_HASH_START, 0));
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
    RUN(test_the_values_are_the_same_on_every_machine);
    RUN(test_eight_bytes_are_a_little_endian_integer);
    RUN(test_bytes_that_are_zero_count);
    RUN(test_many_names_have_as_many_hashes_in_their_low_bits);
    RUN(test_where_a_text_ends_counts);
    RUN(test_where_a_list_ends_counts);
    RUN(test_no_text_differs_from_an_empty_one);
    return check_result();
}
