/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_llama.h"

static uint64_t
hash_of(int layers, bool tied, int ranks, const char *style)
{
    fixture f = fixture_new(ranks);
    add_llama(&f, layers, tied);
    add_style(&f, "layers.*.mlp.up_proj", style);
    const uint64_t hash = make_plan(&f) ? tp_plan_hash(f.plan) : 0;
    fixture_free(&f);
    return hash;
}

static void
test_the_hash_tells_plans_apart_and_nothing_else(void)
{
    const uint64_t hash = hash_of(2, false, 2, "colwise");
    CHECK(hash == hash_of(2, false, 2, "colwise"));
    CHECK(hash != hash_of(3, false, 2, "colwise"));
    CHECK(hash != hash_of(2, true, 2, "colwise"));
    CHECK(hash != hash_of(2, false, 4, "colwise"));
    CHECK(hash != hash_of(2, false, 2, "rowwise"));
    CHECK(hash != hash_of(2, false, 2, "colwise_gather_output"));
    CHECK(hash_of(2, false, 2, "colwise_rep") ==
          hash_of(2, false, 2, "colwise_gather_output"));
}

static void
test_the_table_has_one_row_for_names_that_differ_in_indices(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 3, true);
    add_llama_styles(&f);
    tp_plan_table *table = NULL;
    if (make_plan(&f) && CHECK_OK(tp_plan_table_new(f.plan, &table, &f.err), &f.err)) {
        CHECK_INT_EQ(tp_plan_table_count(table), 10);
        const tp_plan_row *embedding = tp_plan_table_row(table, 0);
        CHECK_TEXT_EQ(embedding->pattern, "model.embed_tokens.weight");
        CHECK_INT_EQ(embedding->full_bytes, 33 * 16 * 4);
        CHECK_INT_EQ(tp_plan_table_bytes(table, 0, 0), 16 * 16 * 4);
        CHECK_INT_EQ(tp_plan_table_bytes(table, 0, 1), 17 * 16 * 4);
        const tp_plan_row *query = tp_plan_table_row(table, 1);
        CHECK_TEXT_EQ(query->pattern, "model.layers.*.self_attn.q_proj.weight");
        CHECK_INT_EQ(query->count, 3);
        CHECK_INT_EQ(query->full_bytes, 3 * 16 * 16 * 4);
        CHECK_INT_EQ(tp_plan_table_bytes(table, 1, 1), 3 * 8 * 16 * 4);
        const tp_plan_row *head = tp_plan_table_row(table, 9);
        CHECK_TEXT_EQ(head->pattern, "lm_head.weight");
        CHECK_INT_EQ(head->count, 1);
        CHECK_INT_EQ(head->full_bytes, 0);
        CHECK_INT_EQ(tp_plan_table_bytes(table, 9, 0), 0);
    }
    tp_plan_table_free(table);
    fixture_free(&f);
}

static void
test_layers_that_are_sharded_differently_have_rows_of_their_own(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 3, false);
    add_rule(&f, "first", ".*layers\\.1\\.mlp\\.up_proj.*", TP_PARTITION_SKIP);
    add_rule(&f, "second", ".*mlp\\.up_proj.*", TP_PARTITION_COLUMN);
    tp_plan_table *table = NULL;
    if (make_plan(&f) && CHECK_OK(tp_plan_table_new(f.plan, &table, &f.err), &f.err)) {
        int rows = 0;
        for (int i = 0; i < tp_plan_table_count(table); i++) {
            const tp_plan_row *row = tp_plan_table_row(table, i);
            if (strcmp(row->pattern, "model.layers.*.mlp.up_proj.weight") == 0)
                rows += row->count == (rows == 0 ? 2 : 1);
        }
        CHECK_INT_EQ(rows, 2);
    }
    tp_plan_table_free(table);
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_the_hash_tells_plans_apart_and_nothing_else);
    RUN(test_the_table_has_one_row_for_names_that_differ_in_indices);
    RUN(test_layers_that_are_sharded_differently_have_rows_of_their_own);
    return check_result();
}
