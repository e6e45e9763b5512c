/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_llama.h"

static void
test_a_llama_with_its_transformers_plan_is_sharded_everywhere(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 2, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "model.layers.0.self_attn.q_proj.weight", 1),
                      "column [8, 16]");
        CHECK_TEXT_EQ(local_of(&f, "model.layers.1.self_attn.k_proj.weight", 1),
                      "column [4, 16]");
        CHECK_TEXT_EQ(local_of(&f, "model.layers.1.self_attn.o_proj.weight", 0),
                      "row [16, 8]");
        CHECK_TEXT_EQ(local_of(&f, "model.layers.1.mlp.down_proj.weight", 0),
                      "row [16, 12]");
        CHECK_TEXT_EQ(local_of(&f, "model.layers.0.input_layernorm.weight", 1),
                      "replicated [16]");
        CHECK_TEXT_EQ(local_of(&f, "model.embed_tokens.weight", 0),
                      "vocabulary [16, 16]");
        CHECK_TEXT_EQ(local_of(&f, "lm_head.weight", 1), "column [17, 16]");
        CHECK(layer_of(&f, "lm_head")->gather_output);
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 16);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
        CHECK_INT_EQ(entry_of(&f, "lm_head.weight")->source, TP_FROM_HF);
        CHECK_TEXT_EQ(entry_of(&f, "lm_head.weight")->rule,
                      "lm_head: colwise_gather_output");
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.input_layernorm.weight")->source,
                     TP_FROM_NOTHING);
    }
    fixture_free(&f);
}

static void
test_a_tied_llama_gives_both_names_one_shard_of_the_vocabulary(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 1, true);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        const tp_entry *embedding = entry_of(&f, "model.embed_tokens.weight");
        const tp_entry *head = entry_of(&f, "lm_head.weight");
        CHECK_INT_EQ(embedding->kind, TP_VOCABULARY);
        CHECK_INT_EQ(head->kind, TP_VOCABULARY);
        CHECK(head->layout == embedding->layout);
        CHECK_INT_EQ(layer_of(&f, "model.embed_tokens")->kind, TP_VOCABULARY);
        CHECK_INT_EQ(layer_of(&f, "lm_head")->kind, TP_COLUMN);
        CHECK(layer_of(&f, "lm_head")->gather_output);
        CHECK_INT_EQ(layer_of(&f, "lm_head")->weight, head->parameter);
    }
    fixture_free(&f);
}

static void
test_the_local_key_value_groups_are_those_of_the_local_heads(void)
{
    /* Four ranks share two key/value heads: one query head each, groups of one. */
    fixture f = fixture_new(4);
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        const char *attention = "model.layers.0.self_attn";
        const int64_t *groups = integer_of(&f, attention, "num_key_value_groups");
        if (CHECK(groups != NULL)) {
            for (int rank = 0; rank < 4; rank++)
                CHECK_INT_EQ(groups[rank], 1);
        }
        CHECK(integer_of(&f, attention, "head_dim") == NULL);
        const tp_layout *layout =
            entry_of(&f, "model.layers.0.self_attn.k_proj.weight")->layout;
        CHECK_INT_EQ(layout->shards[3].runs[0].owner, 2);
        CHECK_INT_EQ(layout->shards[3].runs[0].holders, 2);
    }
    fixture_free(&f);
}

static void
test_integers_that_stay_are_not_listed(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_integer_count(f.plan), 0);
    fixture_free(&f);
}

static void
test_one_rank_holds_everything(void)
{
    fixture f = fixture_new(1);
    add_llama(&f, 1, true);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        for (int i = 0; i < tp_plan_entry_count(f.plan); i++) {
            const tp_entry *entry = tp_plan_entry(f.plan, i);
            int64_t shape[TP_MAX_DIMS];
            tp_plan_local_shape(f.plan, i, 0, shape);
            CHECK_INT_EQ(shape[0], tp_model_parameter(f.model, i)->shape[0]);
            CHECK(entry->layout == NULL || entry->layout->shards[0].count == 1);
        }
        CHECK_INT_EQ(tp_plan_integer_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_equal_shards_share_one_layout(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 3, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        const tp_layout *first =
            entry_of(&f, "model.layers.0.self_attn.q_proj.weight")->layout;
        CHECK(first == entry_of(&f, "model.layers.2.self_attn.q_proj.weight")->layout);
        CHECK(first == entry_of(&f, "model.layers.1.self_attn.o_proj.weight")->layout);
    }
    fixture_free(&f);
}

static void
test_labels_outlive_the_rules(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 1, false);
    add_rule(&f, "layer_specs[0]", ".*up_proj.*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        tp_rules_free(f.rules);
        f.rules = NULL;
        CHECK_TEXT_EQ(entry_of(&f, "model.layers.0.mlp.up_proj.weight")->rule,
                      "layer_specs[0]");
    }
    fixture_free(&f);
}

static void
test_tp_sizes_and_grains_that_cannot_be_are_refused(void)
{
    fixture f = fixture_new(0);
    CHECK_REFUSED(&f, "TP size is 0");
    f = fixture_new(4097);
    CHECK_REFUSED(&f, "TP size is 4097");
    f = fixture_new(2);
    f.options.grain = 0;
    CHECK_REFUSED(&f, "tp_grain_size is 0");
    f = fixture_new(2);
    f.options.embedding_dim = 2;
    CHECK_REFUSED(&f, "embedding_partition_dim is 2");
}

static void
test_more_ranks_than_query_heads_are_refused_naming_the_module(void)
{
    fixture f = fixture_new(8);
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    CHECK_REFUSED(
        &f,
        "cannot shard 'model.layers.0.self_attn.q_proj.weight' [16, 16] over 8 ranks "
        "by rule 'layers.*.self_attn.q_proj: colwise' (tp_plan): module "
        "'model.layers.0.self_attn' has 4 query and 2 key/value heads of 4");
}

static void
test_a_weight_smaller_than_the_tp_size_is_refused(void)
{
    fixture f = fixture_new(8);
    add_linear(&f, "score", 3, 16);
    add_rule(&f, "layer_specs[0]", "score", TP_PARTITION_COLUMN);
    CHECK_REFUSED(&f,
                  "cannot shard 'score.weight' [3, 16] over 8 ranks by rule "
                  "'layer_specs[0]' (partition_config): size 3 along dimension 0");
}

static void
test_a_grain_rounds_widths(void)
{
    fixture f = fixture_new(2);
    f.options.grain = 16;
    add_linear(&f, "up", 50, 8);
    add_rule(&f, "r", "up", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "up.weight", 0), "0+32");
        CHECK_TEXT_EQ(runs_of(&f, "up.weight", 1), "32+18");
    }
    fixture_free(&f);
}

/* Beside a skip an embedding that a default shards, or a norm that a rule speaks of. */
static void
test_a_plan_that_does_more_than_skip_does_not_skip_all(void)
{
    fixture f = fixture_new(2);
    const int weight = add_matrix(&f, "embed", TP_MODULE_EMBEDDING, 8, 8);
    f.facts.input_embedding = tp_model_parameter(f.model, weight)->module;
    add_linear(&f, "up", 8, 8);
    add_rule(&f, "a", "up", TP_PARTITION_SKIP);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "embed.weight")->source, TP_FROM_DEFAULT);
        CHECK(!tp_plan_skips_all(f.plan));
    }
    fixture_free(&f);

    f = fixture_new(2);
    add_module(&f, "attn", TP_MODULE_OTHER, 2, "num_heads", 4, "head_dim", 4);
    const int norm = add_module(&f, "attn.q_norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, norm, "weight", 1, (int64_t[]){16}, -1);
    add_linear(&f, "attn.q_proj", 16, 16);
    add_style(&f, "attn.q_norm", "replicated_with_grad_allreduce");
    add_style(&f, "attn.q_proj", "colwise");
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "attn.q_norm.weight")->kind, TP_REPLICATED);
        CHECK(!tp_plan_skips_all(f.plan));
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_a_llama_with_its_transformers_plan_is_sharded_everywhere);
    RUN(test_a_tied_llama_gives_both_names_one_shard_of_the_vocabulary);
    RUN(test_the_local_key_value_groups_are_those_of_the_local_heads);
    RUN(test_integers_that_stay_are_not_listed);
    RUN(test_one_rank_holds_everything);
    RUN(test_equal_shards_share_one_layout);
    RUN(test_labels_outlive_the_rules);
    RUN(test_tp_sizes_and_grains_that_cannot_be_are_refused);
    RUN(test_more_ranks_than_query_heads_are_refused_naming_the_module);
    RUN(test_a_weight_smaller_than_the_tp_size_is_refused);
    RUN(test_a_grain_rounds_widths);
    RUN(test_a_plan_that_does_more_than_skip_does_not_skip_all);
    return check_result();
}
