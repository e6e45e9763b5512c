/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

/* An attention module "attn" with `query` and `key` heads of 4 that says so itself. */
static void
add_attention(fixture *f, int query, int key)
{
    add_module(f, "attn", TP_MODULE_OTHER, 4, "head_dim", 4, "num_heads", query,
               "num_key_value_heads", key, "num_key_value_groups", query / key);
}

static void
test_a_fused_weight_is_sharded_piece_by_piece_with_its_bias(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 8, 2);
    const int weight = add_linear(&f, "attn.qkv_proj", (8 + 2 + 2) * 4, 16);
    add_vector(&f, weight, "bias", 48);
    add_rule(&f, "r", ".*qkv_proj.*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.qkv_proj.weight", 0), "0+16 32+4 40+4");
        CHECK_TEXT_EQ(runs_of(&f, "attn.qkv_proj.weight", 1), "16+16 36+4 44+4");
        CHECK_TEXT_EQ(runs_of(&f, "attn.qkv_proj.bias", 1), "16+16 36+4 44+4");
        CHECK_INT_EQ(layer_of(&f, "attn.qkv_proj")->bias, 1);
        CHECK_INT_EQ(integer_of(&f, "attn", "num_heads")[1], 4);
        CHECK_INT_EQ(integer_of(&f, "attn", "num_key_value_heads")[0], 1);
        CHECK(integer_of(&f, "attn", "num_key_value_groups") == NULL);
    }
    fixture_free(&f);
}

static const char *
fused_runs(const char *model_type, const char *leaf, int query, int key, int rank)
{
    static char text[256];
    char name[64];
    char parameter[80];
    fixture f = fixture_new(2);
    f.facts.model_type = model_type;
    add_attention(&f, query, key);
    snprintf(name, sizeof(name), "attn.%s", leaf);
    snprintf(parameter, sizeof(parameter), "%s.weight", name);
    add_linear(&f, name, (query + 2 * key) * 4, 16);
    add_rule(&f, "r", ".*", TP_PARTITION_COLUMN);
    text[0] = '\0';
    if (make_plan(&f)) {
        snprintf(text, sizeof(text), "%s", runs_of(&f, parameter, rank));
        CHECK(integer_of(&f, "attn", "num_heads") != NULL);
    }
    fixture_free(&f);
    return text;
}

static void
test_families_that_interleave_are_sharded_between_groups(void)
{
    /* Three heads of [q, k, v] over two ranks: units of 12. */
    CHECK_TEXT_EQ(fused_runs("bloom", "query_key_value", 3, 3, 0), "0+24");
    CHECK_TEXT_EQ(fused_runs("gpt_neox", "query_key_value", 3, 3, 1), "24+12");
    /* Two groups of [4 q, k, v]: units of 24. */
    CHECK_TEXT_EQ(fused_runs("falcon", "query_key_value", 8, 2, 1), "24+24");
    /* With one key/value head there is nothing to interleave. */
    CHECK_TEXT_EQ(fused_runs("falcon", "query_key_value", 8, 1, 1), "16+16 32+8");
    CHECK_TEXT_EQ(fused_runs("falcon", "query_key_value", 8, 1, 0), "0+16 32+8");
    /* Any other family holds them one after the other. */
    CHECK_TEXT_EQ(fused_runs("phi3", "query_key_value", 4, 4, 0), "0+8 16+8 32+8");
    CHECK_TEXT_EQ(fused_runs("gpt_neox", "other", 4, 4, 0), "0+8 16+8 32+8");
}

static void
test_uneven_heads_give_query_output_and_integers_the_same_widths(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 6, 3);
    add_linear(&f, "attn.q_proj", 24, 16);
    add_linear(&f, "attn.k_proj", 12, 16);
    add_linear(&f, "attn.o_proj", 16, 24);
    add_rule(&f, "r", ".*(q|k)_proj.*", TP_PARTITION_COLUMN);
    add_rule(&f, "s", ".*o_proj.*", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "attn.q_proj.weight", 0), "column [16, 16]");
        CHECK_TEXT_EQ(local_of(&f, "attn.k_proj.weight", 1), "column [4, 16]");
        CHECK_TEXT_EQ(local_of(&f, "attn.o_proj.weight", 1), "row [16, 8]");
        CHECK_INT_EQ(integer_of(&f, "attn", "num_heads")[0], 4);
        CHECK_INT_EQ(integer_of(&f, "attn", "num_heads")[1], 2);
        CHECK_INT_EQ(integer_of(&f, "attn", "num_key_value_heads")[1], 1);
    }
    fixture_free(&f);
}

static void
test_counts_of_more_features_than_there_can_be_are_none(void)
{
    fixture f = fixture_new(2);
    const tp_integer counts[] = {{"num_heads", INT64_MAX},
                                 {"num_key_value_heads", INT64_MAX / 8},
                                 {"head_dim", 1}};
    const tp_module attention = {
        .name = "attn", .class_name = "Any", .integers = counts, .integer_count = 3};
    int index = -1;
    CHECK_OK(tp_model_add_module(f.model, &attention, &index, &f.err), &f.err);
    add_linear(&f, "attn.qkv", 12, 12);
    add_rule(&f, "r", ".*qkv.*", TP_PARTITION_COLUMN);
    if (make_plan(&f))
        CHECK_TEXT_EQ(runs_of(&f, "attn.qkv.weight", 0), "0+6");
    fixture_free(&f);
}

static void
test_counts_missing_on_the_module_come_from_the_configuration(void)
{
    fixture f = fixture_new(2);
    add_fact(&f, "n_head", 3);
    add_fact(&f, "n_embd", 12);
    add_module(&f, "attn", TP_MODULE_OTHER, 1, "num_heads", 3);
    add_linear(&f, "attn.dense", 12, 12);
    add_rule(&f, "r", ".*dense.*", TP_PARTITION_ROW);
    if (make_plan(&f))
        CHECK_TEXT_EQ(runs_of(&f, "attn.dense.weight", 0), "0+8");
    fixture_free(&f);
}

static void
test_a_configuration_with_other_heads_is_not_believed(void)
{
    /* An image encoder inside a model whose text half has grouped queries. */
    fixture f = fixture_new(2);
    add_fact(&f, "num_attention_heads", 8);
    add_fact(&f, "num_key_value_heads", 1);
    add_fact(&f, "head_dim", 16);
    add_module(&f, "attn", TP_MODULE_OTHER, 2, "num_heads", 6, "embed_dim", 24);
    add_linear(&f, "attn.qkv", 72, 24);
    add_rule(&f, "r", ".*qkv.*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.qkv.weight", 0), "0+12 24+12 48+12");
        CHECK_INT_EQ(integer_of(&f, "attn", "num_heads")[0], 3);
    }
    fixture_free(&f);
}

static void
test_modules_without_head_counts_are_not_attention(void)
{
    fixture f = fixture_new(2);
    add_fact(&f, "num_attention_heads", 3);
    add_fact(&f, "hidden_size", 12);
    add_module(&f, "mlp", TP_MODULE_OTHER, 1, "hidden_size", 12);
    add_linear(&f, "mlp.up", 12, 12);
    add_rule(&f, "r", ".*up.*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "mlp.up.weight", 0), "0+6");
        CHECK_INT_EQ(tp_plan_integer_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_a_wrapped_layer_works_on_the_heads_of_its_grandparent(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 3, 3);
    add_module(&f, "attn.q_proj", TP_MODULE_OTHER, 0);
    add_linear(&f, "attn.q_proj.base_layer", 12, 16);
    add_module(&f, "attn.mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "attn.mlp.up", 12, 16);
    add_linear(&f, "attn.mlp.down", 16, 12);
    add_rule(&f, "r", ".*(base_layer|up).*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.q_proj.base_layer.weight", 0), "0+8");
        CHECK_TEXT_EQ(runs_of(&f, "attn.mlp.up.weight", 0), "0+6");
    }
    fixture_free(&f);
}

static void
test_longer_heads_follow_the_query_heads(void)
{
    /* A gate beside each of 6 query heads: 8 rows per head. Together they are as
     * large as a fused q|k|v, but there is a layer for the keys. */
    fixture f = fixture_new(2);
    add_attention(&f, 6, 3);
    add_linear(&f, "attn.q_proj", 48, 16);
    add_linear(&f, "attn.k_proj", 12, 16);
    add_linear(&f, "attn.gate", 7, 16);
    add_rule(&f, "r", ".*(q_proj|k_proj|gate).*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.q_proj.weight", 0), "0+32");
        CHECK_TEXT_EQ(runs_of(&f, "attn.gate.weight", 0), "0+4");
    }
    fixture_free(&f);
}

static void
test_pieces_that_the_user_lists_are_heads_where_their_sizes_say_so(void)
{
    fixture f = fixture_new(4);
    add_attention(&f, 4, 2);
    add_linear(&f, "attn.qkv", 16 + 8 + 8 + 4, 16);
    const tp_spec spec = {.partition = TP_PARTITION_COLUMN,
                          .dim = -1,
                          .shape = {2, {0, -1}, 4, {16, 8, 8, 4}}};
    add_spec(&f, "r", ".*qkv.*", spec);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.qkv.weight", 1), "4+4 16+4 24+4 33+1");
        CHECK_TEXT_EQ(runs_of(&f, "attn.qkv.weight", 2), "8+4 20+4 28+4 34+1");
    }
    fixture_free(&f);
}

static void
test_equal_thirds_of_grouped_queries_are_refused_with_the_right_pieces(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 8, 2);
    add_linear(&f, "attn.qkv", 48, 16);
    const tp_spec spec = {
        .partition = TP_PARTITION_COLUMN, .dim = 0, .shape = {2, {3, -1}, 0, {0}}};
    add_spec(&f, "r", ".*qkv.*", spec);
    CHECK_REFUSED(&f, "list the pieces: [32, 8, 8]");
}

static void
test_sharded_queries_over_replicated_keys_are_refused_unless_they_still_group(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 6, 3);
    add_linear(&f, "attn.q_proj", 24, 16);
    add_rule(&f, "r", ".*q_proj.*", TP_PARTITION_COLUMN);
    CHECK_REFUSED(&f, "module 'attn': rank 0 of 2 has 4 query heads over 3");

    f = fixture_new(2);
    add_attention(&f, 8, 1);
    add_linear(&f, "attn.q_proj", 32, 16);
    add_rule(&f, "r", ".*q_proj.*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_INT_EQ(integer_of(&f, "attn", "num_key_value_groups")[1], 4);
        CHECK(integer_of(&f, "attn", "num_key_value_heads") == NULL);
    }
    fixture_free(&f);
}

static void
test_a_gathered_output_leaves_the_heads_alone(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 3, 3);
    add_linear(&f, "attn.q_proj", 12, 16);
    const tp_spec spec = {
        .partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true};
    add_spec(&f, "r", ".*q_proj.*", spec);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.q_proj.weight", 0), "0+6");
        CHECK_INT_EQ(tp_plan_integer_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_a_norm_over_one_head_inside_a_sharded_block_has_its_gradient_summed(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 4, 2);
    add_linear(&f, "attn.q_proj", 16, 16);
    const int norm = add_module(&f, "attn.q_norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, norm, "weight", 1, (int64_t[]){4}, -1);
    add_shaped(&f, norm, "bias", 1, (int64_t[]){4}, -1);
    const int wide = add_module(&f, "attn.k_norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, wide, "weight", 1, (int64_t[]){8}, -1);
    add_rule(&f, "r", ".*q_proj.*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "attn.q_norm.weight")->kind, TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "attn.q_norm.bias")->kind, TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "attn.q_norm.bias")->source, TP_FROM_DEFAULT);
        CHECK_INT_EQ(entry_of(&f, "attn.k_norm.weight")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
test_a_norm_beside_replicated_queries_keeps_its_gradient(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 4, 2);
    add_linear(&f, "attn.q_proj", 16, 16);
    const int norm = add_module(&f, "attn.q_norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, norm, "weight", 1, (int64_t[]){4}, -1);
    add_rule(&f, "r", ".*q_proj.*", TP_PARTITION_SKIP);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "attn.q_norm.weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "attn.q_proj.weight")->kind, TP_SKIPPED);
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
    }
    fixture_free(&f);
}

/* A fused weight is sharded as any other where `counts` give no heads. */
static void
check_no_attention(const tp_integer *counts, int count)
{
    fixture f = fixture_new(2);
    const tp_module attention = {.name = "attn",
                                 .class_name = "Any",
                                 .integers = counts,
                                 .integer_count = count};
    int index = -1;
    CHECK_OK(tp_model_add_module(f.model, &attention, &index, &f.err), &f.err);
    add_fact(&f, "num_attention_heads", 4);
    add_fact(&f, "num_key_value_groups", 3); /* of which 4 heads are no multiple */
    add_linear(&f, "attn.qkv", 12, 12);
    add_rule(&f, "r", ".*qkv.*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.qkv.weight", 0), "0+6");
        CHECK(integer_of(&f, "attn", "num_heads") == NULL);
    }
    fixture_free(&f);
}

static void
test_counts_that_come_to_no_heads_are_none(void)
{
    const tp_integer grouped[] = {{"num_heads", 4}, {"head_dim", 1}};
    const tp_integer long_heads[] = {
        {"num_heads", 4}, {"num_key_value_heads", 1}, {"head_dim", INT64_MAX / 2}};
    const tp_integer keys[] = {
        {"num_heads", 1}, {"num_key_value_heads", INT64_MAX / 2}, {"head_dim", 1}};
    const tp_integer long_keys[] = {
        {"num_heads", 1}, {"num_key_value_heads", INT64_MAX / 2}, {"head_dim", 4}};
    check_no_attention(grouped, 2);
    check_no_attention(long_heads, 3);
    check_no_attention(keys, 3);
    check_no_attention(long_keys, 3);
}

int
main(void)
{
    RUN(test_a_fused_weight_is_sharded_piece_by_piece_with_its_bias);
    RUN(test_families_that_interleave_are_sharded_between_groups);
    RUN(test_uneven_heads_give_query_output_and_integers_the_same_widths);
    RUN(test_counts_of_more_features_than_there_can_be_are_none);
    RUN(test_counts_missing_on_the_module_come_from_the_configuration);
    RUN(test_a_configuration_with_other_heads_is_not_believed);
    RUN(test_modules_without_head_counts_are_not_attention);
    RUN(test_a_wrapped_layer_works_on_the_heads_of_its_grandparent);
    RUN(test_longer_heads_follow_the_query_heads);
    RUN(test_pieces_that_the_user_lists_are_heads_where_their_sizes_say_so);
    RUN(test_equal_thirds_of_grouped_queries_are_refused_with_the_right_pieces);
    RUN(test_sharded_queries_over_replicated_keys_are_refused_unless_they_still_group);
    RUN(test_a_gathered_output_leaves_the_heads_alone);
    RUN(test_a_norm_over_one_head_inside_a_sharded_block_has_its_gradient_summed);
    RUN(test_a_norm_beside_replicated_queries_keeps_its_gradient);
    RUN(test_counts_that_come_to_no_heads_are_none);
    return check_result();
}
