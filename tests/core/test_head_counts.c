/* SPDX-License-Identifier: Apache-2.0 */
#include "model/head_counts.h"

#include "plan_fixture.h"

/* "12 over 6 of 4": query heads, key heads and head size, or "" for no guess. */
static const char *
guess(const tp_integer *integers, int count, int64_t query, int64_t key)
{
    static char text[64];
    const tp_module module = {.integers = integers, .integer_count = count};
    tp_heads heads;
    int64_t size;
    text[0] = '\0';
    if (tp_head_counts_guess(&module, query, key, &heads, &size))
        snprintf(text, sizeof(text), "%lld over %lld of %lld", (long long)heads.query,
                 (long long)heads.key, (long long)size);
    return text;
}

#define GUESS(query, key, ...)                                                   \
    guess((const tp_integer[]){__VA_ARGS__},                                     \
          (int)(sizeof((const tp_integer[]){__VA_ARGS__}) / sizeof(tp_integer)), \
          (query), (key))

static void
test_a_count_is_what_the_widths_are_multiples_of(void)
{
    CHECK_TEXT_EQ(GUESS(48, 48, {"heads", 6}), "6 over 6 of 8");
    CHECK_TEXT_EQ(GUESS(48, 24, {"n_q", 12}, {"n_groups", 6}, {"dim_head", 4}),
                  "12 over 6 of 4");
    CHECK_TEXT_EQ(GUESS(48, 8, {"attn_heads", 6}, {"layer", 2}), "6 over 1 of 8");
}

static void
test_what_counts_features_is_no_count_of_heads(void)
{
    CHECK_TEXT_EQ(GUESS(48, 48, {"d_head", 4}, {"hidden", 48}, {"max_len", 16}), "");
    CHECK_TEXT_EQ(GUESS(48, 48, {"heads", 5}), "");
    CHECK_TEXT_EQ(GUESS(48, 12, {"heads", 6}), "");
    CHECK_TEXT_EQ(GUESS(48, 48, {"config.heads", 6}), "");
    CHECK_TEXT_EQ(GUESS(48, 48, {"heads", 0}), "");
    CHECK_TEXT_EQ(GUESS(-1, 48, {"heads", 6}), "");
}

static void
test_one_of_two_equally_likely_counts_is_not_chosen(void)
{
    CHECK_TEXT_EQ(GUESS(48, 48, {"a", 4}, {"b", 6}), "");
    CHECK_TEXT_EQ(GUESS(48, 48, {"a", 4}, {"b", 6}, {"size", 8}), "6 over 6 of 8");
    CHECK_TEXT_EQ(GUESS(48, 48, {"a", 4}, {"heads", 6}, {"again_heads", 6}),
                  "6 over 6 of 8");
}

static void
test_integers_are_known_by_their_values(void)
{
    const tp_heads heads = {12, 3};
    const struct {
        tp_integer integer;
        tp_head_count meaning;
    } cases[] = {
        {{"n_q", 12}, TP_COUNTS_QUERY_HEADS},
        {{"n_groups", 3}, TP_COUNTS_KEY_HEADS},
        {{"repeats", 4}, TP_COUNTS_GROUP},
        {{"inner_dim", 96}, TP_COUNTS_QUERY_WIDTH},
        {{"kv_dim", 24}, TP_COUNTS_KEY_WIDTH},
        {{"head_dim", 8}, TP_COUNTS_NOTHING},
        {{"config.n_q", 12}, TP_COUNTS_NOTHING},
        {{"layer", 5}, TP_COUNTS_NOTHING},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        CHECK_INT_EQ(tp_head_counts_meaning(&cases[i].integer, heads, 8),
                     cases[i].meaning);
}

static fixture
grouped_new(int ranks)
{
    fixture f = fixture_new(ranks);
    f.options.families = f.options.heuristics = true;
    add_module(&f, "attention", TP_MODULE_OTHER, 3, "n_q", 12, "n_groups", 6,
               "dim_head", 4);
    add_linear(&f, "attention.to_q", 48, 48);
    add_linear(&f, "attention.to_k", 24, 48);
    add_linear(&f, "attention.to_v", 24, 48);
    add_linear(&f, "attention.to_out", 48, 48);
    return f;
}

static void
test_attention_with_names_of_its_own_is_sharded_by_heads(void)
{
    fixture f = grouped_new(3);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "attention.to_q.weight", 1), "column [16, 48]");
        CHECK_TEXT_EQ(local_of(&f, "attention.to_k.weight", 1), "column [8, 48]");
        CHECK_TEXT_EQ(local_of(&f, "attention.to_out.weight", 1), "row [48, 16]");
        CHECK_INT_EQ(entry_of(&f, "attention.to_q.weight")->source, TP_FROM_HEURISTIC);
        const int64_t *query = integer_of(&f, "attention", "n_q");
        const int64_t *key = integer_of(&f, "attention", "n_groups");
        CHECK(query != NULL && query[0] == 4);
        CHECK(key != NULL && key[0] == 2);
        CHECK(integer_of(&f, "attention", "dim_head") == NULL);
    }
    fixture_free(&f);
}

static void
test_a_fused_layer_is_sharded_by_the_guess(void)
{
    fixture f = fixture_new(2);
    f.options.families = f.options.heuristics = true;
    add_module(&f, "attention", TP_MODULE_OTHER, 2, "heads", 6, "groups", 2);
    add_linear(&f, "attention.qkv", 80, 48);
    add_linear(&f, "attention.proj", 48, 48);
    if (make_plan(&f))
        CHECK_TEXT_EQ(runs_of(&f, "attention.qkv.weight", 1), "24+24 56+8 72+8");
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_a_count_is_what_the_widths_are_multiples_of);
    RUN(test_what_counts_features_is_no_count_of_heads);
    RUN(test_one_of_two_equally_likely_counts_is_not_chosen);
    RUN(test_integers_are_known_by_their_values);
    RUN(test_attention_with_names_of_its_own_is_sharded_by_heads);
    RUN(test_a_fused_layer_is_sharded_by_the_guess);
    return check_result();
}
