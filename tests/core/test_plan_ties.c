/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

/* "embed" of 32 x 8 and the linear "lm_head" of the same tensor. */
static fixture
tied(int ranks)
{
    fixture f = fixture_new(ranks);
    const int embedding = add_matrix(&f, "embed", TP_MODULE_EMBEDDING, 32, 8);
    f.facts.input_embedding = 0;
    const int head = add_module(&f, "lm_head", TP_MODULE_LINEAR, 0);
    add_shaped(&f, head, "weight", 2, (int64_t[]){32, 8}, embedding);
    return f;
}

static void
check_vocabulary(fixture *f)
{
    if (make_plan(f)) {
        CHECK_TEXT_EQ(local_of(f, "embed.weight", 1), "vocabulary [16, 8]");
        CHECK(entry_of(f, "lm_head.weight")->layout ==
              entry_of(f, "embed.weight")->layout);
        CHECK_INT_EQ(layer_of(f, "lm_head")->kind, TP_COLUMN);
        CHECK(layer_of(f, "lm_head")->gather_output);
        CHECK_INT_EQ(layer_of(f, "embed")->kind, TP_VOCABULARY);
        CHECK_INT_EQ(tp_plan_message_count(f->plan), 0);
    }
    fixture_free(f);
}

static void
test_a_default_shards_both_names_along_the_vocabulary(void)
{
    fixture f = tied(2);
    add_linear(&f, "up", 16, 8);
    add_rule(&f, "a", "up", TP_PARTITION_COLUMN);
    check_vocabulary(&f);
}

static void
test_the_head_follows_a_rule_for_the_embedding_alone(void)
{
    fixture f = tied(2);
    add_rule(&f, "a", "embed", TP_PARTITION_ROW);
    check_vocabulary(&f);
}

static void
test_the_embedding_follows_a_rule_for_the_head_alone(void)
{
    fixture f = tied(2);
    add_style(&f, "lm_head", "colwise_gather_output");
    check_vocabulary(&f);
}

static void
check_whole(fixture *f, const char *part)
{
    if (make_plan(f)) {
        CHECK_INT_EQ(entry_of(f, "embed.weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(f, "lm_head.weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(tp_plan_layer_count(f->plan), 0);
        if (CHECK_INT_EQ(tp_plan_message_count(f->plan), 1))
            CHECK_TEXT_HAS(tp_plan_message(f->plan, 0)->text, part);
    }
    fixture_free(f);
}

static void
test_contradicting_transformers_styles_keep_the_tensor_replicated_with_a_message(void)
{
    fixture f = tied(2);
    add_style(&f, "embed", "embedding_colwise");
    add_style(&f, "lm_head", "colwise_gather_output");
    check_whole(&f,
                "'embed.weight' (rule 'embed: embedding_colwise' of tp_plan: hidden "
                "along dimension 1) and 'lm_head.weight'");
}

static void
test_a_hidden_shard_that_the_head_cannot_follow_keeps_the_tensor_replicated(void)
{
    fixture f = tied(2);
    add_rule(&f, "a", "embed", TP_PARTITION_COLUMN);
    check_whole(&f, "'lm_head.weight' (no rule) are one tensor");
}

static void
test_contradicting_rules_of_a_configuration_are_refused_naming_both(void)
{
    fixture f = tied(2);
    add_rule(&f, "layer_specs[0]", "embed", TP_PARTITION_COLUMN);
    add_rule(&f, "layer_specs[1]", "lm_head", TP_PARTITION_COLUMN);
    CHECK_REFUSED(&f,
                  "'embed.weight' (rule 'layer_specs[0]' of partition_config: hidden "
                  "along dimension 1) and 'lm_head.weight' (rule 'layer_specs[1]' of "
                  "partition_config: column along dimension 0) are one tensor");
}

static void
test_a_skip_for_one_name_holds_for_the_other(void)
{
    fixture f = tied(2);
    add_rule(&f, "a", "lm_head", TP_PARTITION_SKIP);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "embed.weight")->kind, TP_SKIPPED);
        CHECK_TEXT_EQ(entry_of(&f, "embed.weight")->rule, "a");
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_a_bias_that_is_named_twice_is_sharded_once(void)
{
    /* As in BERT's heads: predictions.bias is the bias of predictions.decoder. */
    fixture f = fixture_new(2);
    const int outer = add_module(&f, "predictions", TP_MODULE_OTHER, 0);
    const int bias = add_shaped(&f, outer, "bias", 1, (int64_t[]){32}, -1);
    const int decoder = add_module(&f, "predictions.decoder", TP_MODULE_LINEAR, 0);
    add_shaped(&f, decoder, "weight", 2, (int64_t[]){32, 8}, -1);
    add_shaped(&f, decoder, "bias", 1, (int64_t[]){32}, bias);
    add_style(&f, "predictions.decoder", "colwise_gather_output");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "predictions.bias", 0), "column [16]");
        CHECK_TEXT_EQ(local_of(&f, "predictions.decoder.bias", 1), "column [16]");
    }
    fixture_free(&f);
}

static void
test_a_bias_shared_by_a_sharded_and_a_replicated_layer_is_refused(void)
{
    fixture f = fixture_new(2);
    const int weight = add_linear(&f, "a", 32, 8);
    const int bias = add_vector(&f, weight, "bias", 32);
    const int other = add_module(&f, "b", TP_MODULE_LINEAR, 0);
    add_shaped(&f, other, "weight", 2, (int64_t[]){32, 8}, -1);
    add_shaped(&f, other, "bias", 1, (int64_t[]){32}, bias);
    add_rule(&f, "r", "a$", TP_PARTITION_COLUMN);
    CHECK_REFUSED(&f,
                  "'a.bias' [32] over 2 ranks by rule 'r' (partition_config): it is "
                  "one tensor with 'b.bias'");
}

static void
test_layers_that_share_a_weight_may_be_sharded_alike(void)
{
    fixture f = fixture_new(2);
    const int weight = add_linear(&f, "layers.0.up", 16, 8);
    const int other = add_module(&f, "layers.1.up", TP_MODULE_LINEAR, 0);
    add_shaped(&f, other, "weight", 2, (int64_t[]){16, 8}, weight);
    add_rule(&f, "r", "layers.*", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "layers.1.up.weight", 1), "row [16, 4]");
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 2);
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_a_default_shards_both_names_along_the_vocabulary);
    RUN(test_the_head_follows_a_rule_for_the_embedding_alone);
    RUN(test_the_embedding_follows_a_rule_for_the_head_alone);
    RUN(test_contradicting_transformers_styles_keep_the_tensor_replicated_with_a_message);
    RUN(test_a_hidden_shard_that_the_head_cannot_follow_keeps_the_tensor_replicated);
    RUN(test_contradicting_rules_of_a_configuration_are_refused_naming_both);
    RUN(test_a_skip_for_one_name_holds_for_the_other);
    RUN(test_a_bias_that_is_named_twice_is_sharded_once);
    RUN(test_a_bias_shared_by_a_sharded_and_a_replicated_layer_is_refused);
    RUN(test_layers_that_share_a_weight_may_be_sharded_alike);
    return check_result();
}
