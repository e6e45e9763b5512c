/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

/* gemma3n: later layers have queries only, and are given the keys of an earlier one. */
static void
test_attention_without_keys_of_its_own_has_those_of_layers_called_alike(void)
{
    fixture f = fixture_new(4);
    for (int i = 0; i < 2; i++) {
        char name[32];
        snprintf(name, sizeof(name), "layers.%d.attn", i);
        add_module(&f, name, TP_MODULE_OTHER, 3, "head_dim", 4, "num_key_value_heads",
                   2, "num_key_value_groups", 2);
        snprintf(name, sizeof(name), "layers.%d.attn.q_proj", i);
        add_linear(&f, name, 16, 32);
        if (i == 0)
            add_linear(&f, "layers.0.attn.k_proj", 8, 32);
    }
    add_fact(&f, "num_attention_heads", 4);
    add_rule(&f, "r", ".*_proj.*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_INT_EQ(integer_of(&f, "layers.1.attn", "num_key_value_groups")[3], 1);
        CHECK_INT_EQ(integer_of(&f, "layers.1.attn", "num_key_value_heads")[3], 1);
    }
    fixture_free(&f);
}

/* One that has other heads is given no keys of theirs, nor one called otherwise. */
static void
test_attention_without_keys_is_given_none_by_layers_that_are_unlike_it(void)
{
    static const struct {
        const char *name;
        int query, key;
    } given[] = {{"layers.1.attn", 8, 2}, {"layers.2.attn", 4, 2}, {"other", 8, 4}};
    for (size_t i = 0; i < sizeof(given) / sizeof(given[0]); i++) {
        fixture f = fixture_new(2);
        char name[64];
        add_module(&f, "layers.0.attn", TP_MODULE_OTHER, 3, "num_heads", 8,
                   "num_key_value_heads", 4, "head_dim", 4);
        add_linear(&f, "layers.0.attn.q_proj", 32, 8);
        add_linear(&f, "layers.0.attn.k_proj", 16, 8);
        add_module(&f, given[i].name, TP_MODULE_OTHER, 3, "num_heads", given[i].query,
                   "num_key_value_heads", given[i].key, "head_dim", 4);
        snprintf(name, sizeof(name), "%s.q_proj", given[i].name);
        add_linear(&f, name, 4 * given[i].query, 8);
        add_rule(&f, "r", ".*_proj", TP_PARTITION_COLUMN);
        if (make_plan(&f)) {
            CHECK_INT_EQ(integer_of(&f, "layers.0.attn", "num_key_value_heads")[0], 2);
            CHECK_INT_EQ(integer_of(&f, given[i].name, "num_heads")[0],
                         given[i].query / 2);
            CHECK(integer_of(&f, given[i].name, "num_key_value_heads") == NULL);
        }
        fixture_free(&f);
    }
}

static void
test_integers_of_a_configuration_that_a_module_holds_are_local_as_its_own(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "attn", TP_MODULE_OTHER, 5, "num_heads", 4, "head_dim", 4,
               "config.num_attention_heads", 4, "config.hidden_size", 16,
               "config.other", 4);
    add_linear(&f, "attn.q_proj", 16, 16);
    add_rule(&f, "r", ".*_proj", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        const int64_t *heads = integer_of(&f, "attn", "config.num_attention_heads");
        CHECK(heads != NULL && heads[0] == 2);
        /* Of the width the configuration has that of the hidden states. */
        CHECK(integer_of(&f, "attn", "config.hidden_size") == NULL);
        CHECK(integer_of(&f, "attn", "config.other") == NULL);
    }
    fixture_free(&f);
}

/* The same heads with keys that are sharded, and with keys that every rank has. */
static void
test_equal_heads_have_other_integers_where_keys_are_replicated(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "one", TP_MODULE_OTHER, 3, "num_heads", 8, "num_key_value_heads", 2,
               "head_dim", 4);
    add_linear(&f, "one.q_proj", 32, 8);
    add_linear(&f, "one.k_proj", 8, 8);
    add_module(&f, "two", TP_MODULE_OTHER, 3, "num_heads", 8, "num_key_value_heads", 2,
               "head_dim", 4);
    add_linear(&f, "two.q_proj", 32, 8);
    add_module(&f, "three", TP_MODULE_OTHER, 3, "num_heads", 8, "num_key_value_heads",
               2, "head_dim", 8);
    add_linear(&f, "three.q_proj", 64, 8);
    add_linear(&f, "three.k_proj", 16, 8);
    add_rule(&f, "r", ".*_proj", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_INT_EQ(integer_of(&f, "one", "num_key_value_heads")[0], 1);
        CHECK(integer_of(&f, "two", "num_key_value_heads") == NULL);
        CHECK_INT_EQ(integer_of(&f, "two", "num_heads")[0], 4);
        CHECK_INT_EQ(integer_of(&f, "three", "num_key_value_heads")[1], 1);
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_attention_without_keys_of_its_own_has_those_of_layers_called_alike);
    RUN(test_attention_without_keys_is_given_none_by_layers_that_are_unlike_it);
    RUN(test_integers_of_a_configuration_that_a_module_holds_are_local_as_its_own);
    RUN(test_equal_heads_have_other_integers_where_keys_are_replicated);
    return check_result();
}
