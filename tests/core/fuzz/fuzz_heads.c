/* SPDX-License-Identifier: Apache-2.0 */
/* Head counts, TP sizes and units: who has which heads, and how many features. */
#include "input.h"
#include "layout/head_split.h"
#include "layout/split.h"
#include "model/head_counts.h"

enum { MOST_RANKS = 64 };

/* Every query head is on one rank, beside the key/value head that it attends to. */
static void
check_spans(tp_heads heads, int ranks, const tp_head_span *spans)
{
    const int64_t group = heads.query / heads.key;
    int64_t query = 0;
    for (int rank = 0; rank < ranks; rank++) {
        const tp_head_span *at = &spans[rank];
        REQUIRE(at->query > 0 && at->key > 0 && at->query_start == query);
        query += at->query;
        REQUIRE(at->query_start / group >= at->key_start);
        REQUIRE((query - 1) / group < at->key_start + at->key);
        REQUIRE(at->holders >= 1 && at->owner <= rank &&
                rank < at->owner + at->holders);
        REQUIRE(at->key_start == spans[at->owner].key_start);
        REQUIRE(at->key == 1 || at->holders == 1);
        REQUIRE(at->key_start + at->key <= heads.key);
    }
    REQUIRE(query == heads.query);
}

static void
try_heads(input *in)
{
    tp_error err = TP_NO_ERROR;
    tp_head_span spans[MOST_RANKS];
    tp_heads own;
    const int ranks = take_int(in, 1, MOST_RANKS), rank = take_int(in, 0, MOST_RANKS);
    const int64_t key = take_size(in);
    tp_heads heads = {take_size(in), key};
    if (take_bool(in) && __builtin_mul_overflow(heads.query, key, &heads.query))
        heads.query = key;
    const bool made = is_done(tp_head_split(heads, ranks, spans, &err), &err);
    if (made)
        check_spans(heads, ranks, spans);
    const bool found = is_done(tp_heads_of_rank(heads, ranks, rank, &own, &err), &err);
    REQUIRE(found == (made && rank < ranks));
    if (found)
        REQUIRE(own.query == spans[rank].query && own.key == spans[rank].key);
}

/* Widths add up to the size, and differ by one unit at most. */
static void
try_split(input *in)
{
    tp_error err = TP_NO_ERROR;
    int64_t widths[MOST_RANKS];
    const int ranks = take_int(in, 0, MOST_RANKS);
    const int64_t unit = take_size(in);
    const bool grain = take_bool(in);
    int64_t size = take_size(in), sum = 0;
    if (take_bool(in) && __builtin_mul_overflow(size, unit, &size))
        size = unit;
    const int result = grain ? tp_split_grain(size, unit, ranks, widths, &err)
                             : tp_split(size, unit, ranks, widths, &err);
    if (!is_done(result, &err))
        return;
    const int64_t fit = grain ? tp_split_fit(size, unit, ranks) : unit;
    for (int rank = 0; rank < ranks; rank++) {
        sum += widths[rank];
        REQUIRE(widths[rank] >= 0 && (!grain || widths[rank] > 0));
        REQUIRE(widths[rank] % fit == 0 || rank == ranks - 1);
        REQUIRE(widths[0] - widths[rank] <= fit && widths[rank] - widths[0] < fit);
    }
    REQUIRE(sum == size);
}

/* Counts that are guessed make the widths that they were guessed from. */
static void
try_guess(input *in)
{
    static const char *const keys[] = {"num_heads", "heads",  "n_kv",    "head_dim",
                                       "size",      "groups", "d_inner", "other.heads"};
    tp_integer integers[8];
    tp_heads heads;
    int64_t head_size;
    const int64_t query = take_size(in), key = take_size(in);
    const int count = take_int(in, 0, COUNT(integers));
    for (int i = 0; i < count; i++) {
        integers[i].key = keys[take_int(in, 0, COUNT(keys) - 1)];
        integers[i].value = take_size(in);
    }
    const tp_module module = {.integers = integers, .integer_count = count};
    if (!tp_head_counts_guess(&module, query, key, &heads, &head_size))
        return;
    REQUIRE(heads.query > 0 && heads.key > 0 && heads.query % heads.key == 0);
    REQUIRE(heads.query * head_size == query && heads.key * head_size == key);
    for (int i = 0; i < count; i++)
        REQUIRE(tp_head_counts_meaning(&integers[i], heads, head_size) <
                TP_COUNTS_KINDS);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const tries[])(input *) = {try_heads, try_split, try_guess};
    input in = input_of(data, size);
    tries[take_int(&in, 0, COUNT(tries) - 1)](&in);
    input_end(&in);
    return 0;
}
