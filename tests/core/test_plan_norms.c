/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

/* Attention of `query` heads of 4 over `key` ones, with norms of `size` and `key_size`
 * features. */
static void
add_attention(fixture *f, int query, int key, int size, int key_size)
{
    add_module(f, "attn", TP_MODULE_OTHER, 3, "head_dim", 4, "num_heads", query,
               "num_key_value_heads", key);
    add_linear(f, "attn.q_proj", query * 4, 16);
    add_linear(f, "attn.k_proj", key * 4, 16);
    add_linear(f, "attn.v_proj", key * 4, 16);
    add_linear(f, "attn.o_proj", 16, query * 4);
    const int first = add_module(f, "attn.q_norm", TP_MODULE_OTHER, 0);
    add_shaped(f, first, "weight", 1, (int64_t[]){size}, -1);
    const int second = add_module(f, "attn.k_norm", TP_MODULE_OTHER, 0);
    add_shaped(f, second, "weight", 1, (int64_t[]){key_size}, -1);
}

static void
test_a_norm_over_all_features_follows_its_projection(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 4, 2, 16, 8);
    add_rule(&f, "qkv", ".*[qkv]_proj.*", TP_PARTITION_COLUMN);
    add_rule(&f, "o", ".*o_proj.*", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        const tp_layer *query = layer_of(&f, "attn.q_norm");
        const tp_layer *key = layer_of(&f, "attn.k_norm");
        CHECK_INT_EQ(query->kind, TP_NORM);
        CHECK_INT_EQ(query->weight, entry_of(&f, "attn.q_proj.weight")->parameter);
        CHECK_INT_EQ(key->weight, entry_of(&f, "attn.k_proj.weight")->parameter);
        CHECK_INT_EQ(entry_of(&f, "attn.q_norm.weight")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
test_the_gradient_of_a_norm_over_all_features_is_never_summed(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 4, 2, 16, 8);
    add_attention_styles(&f, "attn");
    add_style(&f, "attn.q_norm", "replicated_with_grad_allreduce");
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "attn.q_norm.weight")->kind, TP_REPLICATED);
    fixture_free(&f);
}

static void
test_a_norm_over_one_head_is_no_layer(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 4, 2, 4, 4);
    add_rule(&f, "qkv", ".*[qkv]_proj.*", TP_PARTITION_COLUMN);
    add_rule(&f, "o", ".*o_proj.*", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        CHECK(layer_of(&f, "attn.q_norm") == NULL);
        CHECK_INT_EQ(entry_of(&f, "attn.k_norm.weight")->kind, TP_REPLICATED_SUM);
    }
    fixture_free(&f);
}

static void
test_a_norm_of_what_is_gathered_is_no_layer(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 4, 4, 16, 16);
    add_style(&f, "attn.q_proj", "colwise_gather_output");
    add_style(&f, "attn.k_proj", "colwise_gather_output");
    if (make_plan(&f)) {
        CHECK(layer_of(&f, "attn.q_norm") == NULL);
        CHECK_INT_EQ(entry_of(&f, "attn.q_norm.weight")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
test_a_norm_ahead_of_a_row_follows_its_input(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "mlp.up_proj", 24, 8);
    const int row = add_linear(&f, "mlp.down_proj", 8, 24);
    const int norm = add_module(&f, "mlp.ffn_sub_norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, norm, "weight", 1, (int64_t[]){24}, -1);
    add_rule(&f, "up", ".*up_proj.*", TP_PARTITION_COLUMN);
    add_rule(&f, "down", ".*down_proj.*", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        CHECK_INT_EQ(layer_of(&f, "mlp.ffn_sub_norm")->kind, TP_NORM);
        CHECK_INT_EQ(layer_of(&f, "mlp.ffn_sub_norm")->weight, row);
    }
    fixture_free(&f);
}

/* The numbers of an activation between two sharded layers of `mlp`. */
static void
check_activation(const char *leaf, int64_t size, tp_kind expected)
{
    fixture f = fixture_new(2);
    char name[32];
    snprintf(name, sizeof(name), "mlp.%s", leaf);
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "mlp.up_proj", 24, 8);
    add_linear(&f, "mlp.down_proj", 8, 24);
    const int module = add_module(&f, name, TP_MODULE_OTHER, 0);
    const int index = add_shaped(&f, module, "alpha", 1, &size, -1);
    add_style(&f, "mlp.up_proj", "colwise");
    add_style(&f, "mlp.down_proj", "rowwise");
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_entry(f.plan, index)->kind, expected);
    fixture_free(&f);
}

static void
test_the_gradient_of_an_activation_inside_a_sharded_block_is_summed(void)
{
    check_activation("act_fn", 1, TP_REPLICATED_SUM);
    check_activation("act_fn", 24, TP_REPLICATED); /* one for each feature */
    check_activation("scale", 1, TP_REPLICATED);
}

/* A norm beside the sharded layers of queries: the row layer comes first. */
static fixture
odd_norm(const char *name, tp_module_kind kind, int dims, const int64_t *shape)
{
    fixture f = fixture_new(2);
    add_module(&f, "attn", TP_MODULE_OTHER, 0);
    add_linear(&f, "attn.q_o_proj", 16, 32);
    add_linear(&f, "attn.q_proj", 32, 16);
    const int norm = add_module(&f, name, kind, 0);
    add_shaped(&f, norm, "weight", dims, shape, -1);
    add_rule(&f, "q", ".*q_proj", TP_PARTITION_COLUMN);
    add_rule(&f, "o", ".*q_o_proj", TP_PARTITION_ROW);
    return f;
}

static void
test_a_norm_follows_no_row_layer_of_the_size_of_its_projection(void)
{
    fixture f = odd_norm("attn.q_norm", TP_MODULE_OTHER, 1, (int64_t[]){32});
    if (make_plan(&f)) {
        CHECK_INT_EQ(layer_of(&f, "attn.q_norm")->kind, TP_NORM);
        CHECK_INT_EQ(layer_of(&f, "attn.q_norm")->weight,
                     entry_of(&f, "attn.q_proj.weight")->parameter);
    }
    fixture_free(&f);
    /* That of keys finds none, whatever is in the modules behind. */
    f = odd_norm("attn.k_norm", TP_MODULE_OTHER, 1, (int64_t[]){32});
    add_module(&f, "other", TP_MODULE_OTHER, 0);
    add_linear(&f, "other.k_proj", 32, 16);
    add_rule(&f, "k", ".*k_proj", TP_PARTITION_COLUMN);
    if (make_plan(&f))
        CHECK(layer_of(&f, "attn.k_norm") == NULL);
    fixture_free(&f);
}

static void
test_what_is_only_called_like_a_norm_is_none(void)
{
    fixture f = odd_norm("attn.q_norm", TP_MODULE_LINEAR, 2, (int64_t[]){32, 32});
    if (make_plan(&f))
        CHECK(layer_of(&f, "attn.q_norm") == NULL);
    fixture_free(&f);
    f = odd_norm("attn.q_norm", TP_MODULE_OTHER, 2, (int64_t[]){32, 4});
    if (make_plan(&f))
        CHECK(layer_of(&f, "attn.q_norm") == NULL);
    fixture_free(&f);
    f = odd_norm("q_norm", TP_MODULE_OTHER, 1, (int64_t[]){32}); /* in no module */
    if (make_plan(&f))
        CHECK(layer_of(&f, "q_norm") == NULL);
    fixture_free(&f);
}

static void
test_a_norm_whose_weight_a_plan_shards_is_no_layer_of_another_weight(void)
{
    fixture f = fixture_new(2);
    add_attention(&f, 4, 2, 16, 8);
    add_attention_styles(&f, "attn");
    add_style(&f, "attn.q_norm", "colwise");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "attn.q_norm.weight", 0), "column [8]");
        CHECK(layer_of(&f, "attn.q_norm") == NULL);
        CHECK_INT_EQ(layer_of(&f, "attn.k_norm")->kind, TP_NORM);
    }
    fixture_free(&f);
}

static void
test_a_norm_ahead_of_a_row_that_splits_its_input_has_all_features(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "mlp.down_proj", 8, 24);
    const int norm = add_module(&f, "mlp.ffn_sub_norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, norm, "weight", 1, (int64_t[]){24}, -1);
    add_spec(&f, "down", ".*down_proj.*",
             (tp_spec){.partition = TP_PARTITION_ROW, .dim = -1, .split_input = true});
    if (make_plan(&f))
        CHECK(layer_of(&f, "mlp.ffn_sub_norm") == NULL);
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_the_gradient_of_an_activation_inside_a_sharded_block_is_summed);
    RUN(test_a_norm_over_all_features_follows_its_projection);
    RUN(test_the_gradient_of_a_norm_over_all_features_is_never_summed);
    RUN(test_a_norm_over_one_head_is_no_layer);
    RUN(test_a_norm_of_what_is_gathered_is_no_layer);
    RUN(test_a_norm_ahead_of_a_row_follows_its_input);
    RUN(test_a_norm_follows_no_row_layer_of_the_size_of_its_projection);
    RUN(test_what_is_only_called_like_a_norm_is_none);
    RUN(test_a_norm_whose_weight_a_plan_shards_is_no_layer_of_another_weight);
    RUN(test_a_norm_ahead_of_a_row_that_splits_its_input_has_all_features);
    return check_result();
}
