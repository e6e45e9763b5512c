/* SPDX-License-Identifier: Apache-2.0 */
#include "lookup_on_cpu.h"

#include <stdlib.h>

enum { PAD = 64, START = 30, ROWS = 11, VOCABULARY = 50 };

/* Sizes around those of words and tiles: many rows in a tile, one, and parts of one. */
static const int64_t kRowBytes[] = {1,    2,    6,    8,     16,    24,    48,
                                    1000, 2048, 2049, 16384, 16400, 40002, 49152};
static const int64_t kTokens[] = {1, 7, 64, 257};

enum {
    SIZES = sizeof(kRowBytes) / sizeof(*kRowBytes),
    COUNTS = sizeof(kTokens) / sizeof(*kTokens)
};

/* Memory with `bytes` bytes `off` an aligned address, padding before and behind. */
static unsigned char *
make(int64_t bytes, int64_t off, unsigned char **owned)
{
    const size_t room = ((size_t)(bytes + off) + 3 * PAD) / PAD * PAD;
    *owned = aligned_alloc(PAD, room);
    for (size_t i = 0; i < room; i++)
        (*owned)[i] = (unsigned char)(1 + i % 241);
    return *owned + PAD + off;
}

/* The id of a token: each of the vocabulary in turn, both borders among them. */
static int64_t
id_of(int64_t token)
{
    return token * 7 % VOCABULARY;
}

static void
fill_ids(void *ids, int64_t tokens, int32_t id_bytes)
{
    for (int64_t token = 0; token < tokens; token++)
        if (id_bytes == 4)
            ((int32_t *)ids)[token] = (int32_t)id_of(token);
        else
            ((int64_t *)ids)[token] = id_of(token);
}

/* Whether each token has its row or zeros, and the bytes around are as they were. */
static bool
is_looked_up(const unsigned char *found, const unsigned char *weight, int64_t tokens,
             int64_t bytes)
{
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t row = id_of(token) - START;
        for (int64_t i = 0; i < bytes; i++) {
            const int want = row < 0 || row >= ROWS ? 0 : weight[row * bytes + i];
            if (found[token * bytes + i] != want)
                return false;
        }
    }
    return found[-1] != 0 && found[tokens * bytes] != 0;
}

static void
try_size(int64_t tokens, int64_t bytes, int64_t weight_off, int64_t found_off,
         int32_t id_bytes)
{
    unsigned char *owned[2];
    unsigned char *weight = make(ROWS * bytes, weight_off, &owned[0]);
    unsigned char *found = make(tokens * bytes, found_off, &owned[1]);
    void *ids = malloc((size_t)(tokens * id_bytes));
    fill_ids(ids, tokens, id_bytes);
    tp_lookup lookup = tp_lookup_make(weight, found, tokens, bytes);
    lookup.ids = ids;
    lookup.start = START;
    lookup.rows = ROWS;
    lookup.vocabulary = VOCABULARY;
    lookup.id_bytes = id_bytes;
    CHECK_INT_EQ(tp_lookup_outside(&lookup), -1);
    start_lookup_on_cpu(&lookup);
    if (!CHECK(is_looked_up(found, weight, tokens, bytes)))
        fprintf(stderr, "by tiles: %lld tokens of %lld bytes\n", (long long)tokens,
                (long long)bytes);
    memset(found, 0xee, (size_t)(tokens * bytes));
    tp_lookup_on_cpu(&lookup, tokens / 3, tokens);
    tp_lookup_on_cpu(&lookup, 0, tokens / 3);
    if (!CHECK(is_looked_up(found, weight, tokens, bytes)))
        fprintf(stderr, "on a CPU: %lld tokens of %lld bytes\n", (long long)tokens,
                (long long)bytes);
    free(ids);
    free(owned[0]);
    free(owned[1]);
}

static void
test_tiles_and_the_cpu_give_own_rows_and_zeros_elsewhere(void)
{
    for (int size = 0; size < SIZES; size++)
        for (int count = 0; count < COUNTS; count++) {
            try_size(kTokens[count], kRowBytes[size], 0, 0, 8);
            try_size(kTokens[count], kRowBytes[size], 8, 2, 4);
        }
    try_size(257, 48, 1, 16, 4);
}

static void
test_words_are_as_wide_as_addresses_and_rows_allow(void)
{
    const char *at = (const char *)(uintptr_t)4096;
    char *to = (char *)(uintptr_t)8192;
    CHECK_INT_EQ(tp_lookup_make(at, to, 9, 64).copy.word, 16);
    CHECK_INT_EQ(tp_lookup_make(at + 8, to, 9, 64).copy.word, 8);
    CHECK_INT_EQ(tp_lookup_make(at, to + 4, 9, 64).copy.word, 4);
    CHECK_INT_EQ(tp_lookup_make(at, to, 9, 66).copy.word, 2);
    CHECK_INT_EQ(tp_lookup_make(at, to, 9, 67).copy.word, 1);
}

static void
test_an_id_outside_of_the_vocabulary_is_found_and_sets_all_bits(void)
{
    const int64_t strange[] = {-1, VOCABULARY, INT64_MIN, INT64_MAX};
    for (int i = 0; i < 4; i++) {
        const int64_t ids[] = {START, strange[i], 0};
        uint32_t weight[ROWS * 2], found[6];
        for (uint32_t k = 0; k < ROWS * 2; k++)
            weight[k] = k + 5;
        tp_lookup lookup = tp_lookup_make(weight, found, 3, 8);
        lookup.ids = ids;
        lookup.start = START;
        lookup.rows = ROWS;
        lookup.vocabulary = VOCABULARY;
        lookup.id_bytes = 8;
        CHECK_INT_EQ(tp_lookup_outside(&lookup), 1);
        start_lookup_on_cpu(&lookup);
        const uint32_t want[] = {5, 6, UINT32_MAX, UINT32_MAX, 0, 0};
        CHECK(memcmp(found, want, sizeof(want)) == 0);
    }
}

static void
test_places_beyond_32_bits_are_exact(void)
{
    /* 6000 rows of 3 MiB, the last of which is looked up by all tokens. */
    const int64_t bytes = 3 << 20;
    static int32_t ids[5000];
    for (int i = 0; i < 5000; i++)
        ids[i] = 5999;
    tp_lookup lookup = tp_lookup_make((void *)(uintptr_t)4096,
                                      (void *)((uintptr_t)1 << 40), 5000, bytes);
    lookup.ids = ids;
    lookup.rows = 6000;
    lookup.vocabulary = 6000;
    lookup.id_bytes = 4;
    const int64_t index = tp_copy_tiles(&lookup.copy) - 1;
    const tp_tile tile = tp_copy_tile(&lookup.copy, index);
    const int64_t token = tp_lookup_token(&lookup, &tile, index);
    CHECK_INT_EQ(token, 4999);
    const int32_t last = tile.words - 1;
    CHECK_INT_EQ(tp_lookup_to(&lookup, &tile, last), 5000 * bytes - 16);
    CHECK_INT_EQ(tp_lookup_from(&lookup, &tile, token, last), 6000 * bytes - 16);

    /* Rows of a byte: the token's number itself is beyond 32 bits. */
    lookup =
        tp_lookup_make((void *)(uintptr_t)4096, (void *)(uintptr_t)1, 1LL << 40, 1);
    const int64_t far = tp_copy_tiles(&lookup.copy) - 1;
    const tp_tile end = tp_copy_tile(&lookup.copy, far);
    CHECK_INT_EQ(tp_lookup_token(&lookup, &end, far), (1LL << 40) - 2048);
}

static void
test_a_rank_without_rows_and_a_lookup_without_tokens_are_nothing_special(void)
{
    const int64_t ids[] = {0, 3};
    uint16_t found[] = {7, 7, 7, 7};
    tp_lookup lookup = tp_lookup_make(NULL, found, 2, 4);
    lookup.ids = ids;
    lookup.start = 4;
    lookup.vocabulary = 4;
    lookup.id_bytes = 8;
    start_lookup_on_cpu(&lookup);
    const uint16_t want[] = {0, 0, 0, 0};
    CHECK(memcmp(found, want, sizeof(want)) == 0);
    lookup.copy.rows = 0;
    CHECK_INT_EQ(tp_lookup_outside(&lookup), -1);
    start_lookup_on_cpu(&lookup);
    tp_lookup_on_cpu(&lookup, 0, 0);
}

int
main(void)
{
    RUN(test_tiles_and_the_cpu_give_own_rows_and_zeros_elsewhere);
    RUN(test_words_are_as_wide_as_addresses_and_rows_allow);
    RUN(test_an_id_outside_of_the_vocabulary_is_found_and_sets_all_bits);
    RUN(test_places_beyond_32_bits_are_exact);
    RUN(test_a_rank_without_rows_and_a_lookup_without_tokens_are_nothing_special);
    return check_result();
}
