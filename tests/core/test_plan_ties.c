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

/* Linear layers "a" and "b" of one tensor of 16 x 8, with a specification each. */
static fixture
two_specs(tp_spec a, tp_spec b)
{
    fixture f = fixture_new(2);
    const int weight = add_linear(&f, "a", 16, 8);
    const int other = add_module(&f, "b", TP_MODULE_LINEAR, 0);
    add_shaped(&f, other, "weight", 2, (int64_t[]){16, 8}, weight);
    add_spec(&f, "ra", "a$", a);
    add_spec(&f, "rb", "b$", b);
    return f;
}

static void
test_two_views_of_one_tensor_are_refused_unless_they_come_to_the_same(void)
{
    const tp_spec plain = {.partition = TP_PARTITION_COLUMN, .dim = -1};
    tp_spec outer = plain, inner = plain, halves = plain, listed = plain;
    outer.dim = inner.dim = 0;
    inner.shape = (tp_shape){3, {4, 4, 8}, 0, {0}};
    outer.dim = 1; /* each of four parts */
    outer.shape = inner.shape;
    halves.shape = (tp_shape){2, {2, -1}, 0, {0}};
    listed.shape = (tp_shape){2, {0, -1}, 2, {8, 8}};
    fixture f = two_specs(plain, outer);
    CHECK_REFUSED(&f, "are one tensor and cannot be sharded in two ways");
    f = two_specs(plain, inner);
    CHECK_REFUSED(&f, "are one tensor and cannot be sharded in two ways");
    f = two_specs(plain, halves);
    CHECK_REFUSED(&f, "are one tensor and cannot be sharded in two ways");
    f = two_specs(halves, listed);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "a.weight", 1), "4+4 12+4");
        CHECK_TEXT_EQ(runs_of(&f, "b.weight", 1), "4+4 12+4");
    }
    fixture_free(&f);
}

/* Of names that stay replicated the first that sums its gradient speaks for all. */
static void
test_a_sum_of_gradients_holds_for_all_names_of_a_replicated_tensor(void)
{
    for (int i = 0; i < 2; i++) {
        const tp_spec skip = {.partition = TP_PARTITION_SKIP, .dim = -1};
        tp_spec sum = skip;
        sum.sum_gradient = true;
        fixture f = two_specs(i == 0 ? skip : sum, i == 0 ? sum : skip);
        if (make_plan(&f)) {
            CHECK_INT_EQ(entry_of(&f, "a.weight")->kind, TP_REPLICATED_SUM);
            CHECK_INT_EQ(entry_of(&f, "b.weight")->kind, TP_REPLICATED_SUM);
            CHECK_TEXT_EQ(entry_of(&f, "a.weight")->rule, i == 0 ? "rb" : "ra");
        }
        fixture_free(&f);
    }
    const tp_spec sum = {
        .partition = TP_PARTITION_SKIP, .dim = -1, .sum_gradient = true};
    fixture f = two_specs(sum, sum);
    if (make_plan(&f))
        CHECK_TEXT_EQ(entry_of(&f, "b.weight")->rule, "ra");
    fixture_free(&f);
}

static void
test_a_rule_of_a_configuration_is_refused_beside_a_plan_that_shards_otherwise(void)
{
    fixture f = tied(2);
    add_style(&f, "embed", "embedding_colwise");
    add_rule(&f, "mine", "lm_head", TP_PARTITION_COLUMN);
    CHECK_REFUSED(&f, "rule 'mine' of partition_config: column along dimension 0");
    /* One that skips asks for nothing that the plan could not do. */
    f = tied(2);
    add_style(&f, "embed", "embedding_colwise");
    add_rule(&f, "mine", "lm_head", TP_PARTITION_SKIP);
    check_whole(&f, "it stays replicated");
}

/* The name of a layer follows only where its module makes a full output of rows. */
static void
test_a_name_that_is_no_matrix_of_rows_keeps_the_tensor_replicated(void)
{
    static const char *const leaves[] = {"kernel", "weight"};
    for (int i = 0; i < 2; i++) {
        fixture f = fixture_new(2);
        tp_spec spec = {.partition = TP_PARTITION_COLUMN, .dim = -1};
        if (i == 1) { /* in each of four parts */
            spec.dim = 1;
            spec.shape = (tp_shape){3, {4, 4, 8}, 0, {0}};
        }
        const int weight = add_linear(&f, "a", 16, 8);
        const int other = add_module(&f, "b", TP_MODULE_LINEAR, 0);
        add_shaped(&f, other, leaves[i], 2, (int64_t[]){16, 8}, weight);
        add_spec(&f, "r", "a$", spec);
        if (make_plan(&f)) {
            CHECK_INT_EQ(entry_of(&f, "a.weight")->kind, TP_REPLICATED);
            CHECK_TEXT_HAS(tp_plan_message(f.plan, 0)->text,
                           "are one tensor and cannot be sharded alike");
        }
        fixture_free(&f);
    }
}

static void
test_a_bias_of_layers_that_are_sharded_otherwise_is_refused(void)
{
    fixture f = fixture_new(2);
    const int weight = add_linear(&f, "a", 16, 8);
    const int bias = add_vector(&f, weight, "bias", 16);
    add_linear(&f, "b", 16, 8);
    add_shaped(&f, 1, "bias", 1, (int64_t[]){16}, bias);
    add_rule(&f, "ra", "a$", TP_PARTITION_COLUMN);
    add_spec(&f, "rb", "b$",
             (tp_spec){.partition = TP_PARTITION_COLUMN,
                       .dim = -1,
                       .shape = {2, {2, -1}, 0, {0}}});
    CHECK_REFUSED(&f, "it is one tensor with 'b.bias'");
}

static void
test_a_bias_that_a_rule_skips_under_its_other_name_is_refused(void)
{
    fixture f = fixture_new(2);
    const int outer = add_module(&f, "predictions", TP_MODULE_OTHER, 0);
    const int bias = add_shaped(&f, outer, "bias", 1, (int64_t[]){32}, -1);
    const int decoder = add_module(&f, "predictions.decoder", TP_MODULE_LINEAR, 0);
    add_shaped(&f, decoder, "weight", 2, (int64_t[]){32, 8}, -1);
    add_shaped(&f, decoder, "bias", 1, (int64_t[]){32}, bias);
    add_rule(&f, "skip", "predictions.bias", TP_PARTITION_SKIP);
    add_rule(&f, "r", "predictions.decoder$", TP_PARTITION_COLUMN);
    CHECK_REFUSED(&f, "it is one tensor with 'predictions.bias'");
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
    RUN(test_two_views_of_one_tensor_are_refused_unless_they_come_to_the_same);
    RUN(test_a_sum_of_gradients_holds_for_all_names_of_a_replicated_tensor);
    RUN(test_a_rule_of_a_configuration_is_refused_beside_a_plan_that_shards_otherwise);
    RUN(test_a_name_that_is_no_matrix_of_rows_keeps_the_tensor_replicated);
    RUN(test_a_bias_of_layers_that_are_sharded_otherwise_is_refused);
    RUN(test_a_bias_that_a_rule_skips_under_its_other_name_is_refused);
    return check_result();
}
