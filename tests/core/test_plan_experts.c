/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

enum { EXPERTS = 3, HIDDEN = 8, INNER = 6 };

/* A module "experts" with gate_up and down; `transposed`: [experts, in, out]. */
static int
add_experts(fixture *f, bool transposed)
{
    static const int64_t up[] = {EXPERTS, 2 * INNER, HIDDEN};
    static const int64_t up_turned[] = {EXPERTS, HIDDEN, 2 * INNER};
    static const int64_t down[] = {EXPERTS, HIDDEN, INNER};
    static const int64_t down_turned[] = {EXPERTS, INNER, HIDDEN};
    const int module = add_module(f, "experts", TP_MODULE_OTHER, 0);
    add_shaped(f, module, "gate_up_proj", 3, transposed ? up_turned : up, -1);
    add_shaped(f, module, "down_proj", 3, transposed ? down_turned : down, -1);
    return module;
}

static void
test_experts_are_sharded_inside_each_expert_and_their_module_sums(void)
{
    fixture f = fixture_new(2);
    add_experts(&f, false);
    add_style(&f, "experts.gate_up_proj", "packed_colwise");
    add_style(&f, "experts.down_proj", "rowwise");
    add_style(&f, "experts", "moe_tp_experts");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "experts.gate_up_proj", 1), "column [3, 6, 8]");
        CHECK_TEXT_EQ(runs_of(&f, "experts.gate_up_proj", 1), "3+3 9+3");
        CHECK_INT_EQ(entry_of(&f, "experts.gate_up_proj")->outer, EXPERTS);
        CHECK_INT_EQ(entry_of(&f, "experts.gate_up_proj")->inner, HIDDEN);
        CHECK_TEXT_EQ(local_of(&f, "experts.down_proj", 0), "row [3, 8, 3]");
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 1);
        CHECK_INT_EQ(layer_of(&f, "experts")->kind, TP_EXPERTS);
        CHECK_INT_EQ(layer_of(&f, "experts")->weight, -1);
        CHECK_INT_EQ(layer_of(&f, "experts")->divided_count, 0);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_a_style_names_a_dimension_where_experts_are_transposed(void)
{
    fixture f = fixture_new(2);
    add_experts(&f, true);
    add_style(&f, "experts.gate_up_proj", "packed_rowwise");
    add_style(&f, "experts.down_proj", "colwise");
    add_style(&f, "experts", "moe_tp_experts");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "experts.gate_up_proj", 0), "row [3, 8, 6]");
        CHECK_TEXT_EQ(runs_of(&f, "experts.gate_up_proj", 0), "0+3 6+3");
        CHECK_TEXT_EQ(local_of(&f, "experts.down_proj", 1), "column [3, 3, 8]");
        CHECK(layer_of(&f, "experts") != NULL);
    }
    fixture_free(&f);
}

static void
test_gate_and_up_that_take_turns_are_sharded_in_pairs(void)
{
    fixture f = fixture_new(4);
    add_experts(&f, true);
    add_rule(&f, "up", ".*gate_up_proj$", TP_PARTITION_ROW);
    add_rule(&f, "down", ".*down_proj$", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "experts.gate_up_proj", 0), "0+4");
        CHECK_TEXT_EQ(runs_of(&f, "experts.gate_up_proj", 3), "10+2");
        CHECK_TEXT_EQ(runs_of(&f, "experts.down_proj", 0), "0+2");
        CHECK_TEXT_EQ(runs_of(&f, "experts.down_proj", 3), "5+1");
        CHECK(layer_of(&f, "experts") != NULL);
    }
    fixture_free(&f);
}

static void
test_the_bias_of_a_viewed_weight_is_viewed_alike(void)
{
    fixture f = fixture_new(2);
    const int module = add_experts(&f, false);
    add_shaped(&f, module, "gate_up_proj_bias", 2, (int64_t[]){EXPERTS, 2 * INNER}, -1);
    tp_spec up = {.partition = TP_PARTITION_COLUMN, .dim = 2};
    up.shape = (tp_shape){.dims = 4, .sizes = {EXPERTS, 2, INNER, HIDDEN}};
    add_spec(&f, "up", ".*gate_up_proj$", up);
    add_rule(&f, "down", ".*down_proj$", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "experts.gate_up_proj", 1), "3+3");
        CHECK_TEXT_EQ(runs_of(&f, "experts.down_proj", 1), "3+3");
        CHECK_TEXT_EQ(local_of(&f, "experts.gate_up_proj_bias", 1), "column [3, 6]");
        CHECK_TEXT_EQ(runs_of(&f, "experts.gate_up_proj_bias", 1), "3+3");
        CHECK_INT_EQ(entry_of(&f, "experts.gate_up_proj_bias")->outer, 2 * EXPERTS);
        CHECK_INT_EQ(entry_of(&f, "experts.gate_up_proj_bias")->inner, 1);
    }
    fixture_free(&f);
}

static void
test_biases_of_experts_are_sharded_or_added_in_shares(void)
{
    fixture f = fixture_new(2);
    const int module = add_experts(&f, true);
    add_shaped(&f, module, "gate_up_proj_bias", 2, (int64_t[]){EXPERTS, 2 * INNER}, -1);
    const int last =
        add_shaped(&f, module, "down_proj_bias", 2, (int64_t[]){EXPERTS, HIDDEN}, -1);
    add_shaped(&f, module, "scale", 2, (int64_t[]){EXPERTS, HIDDEN}, -1);
    add_rule(&f, "up", ".*gate_up_proj$", TP_PARTITION_ROW);
    add_rule(&f, "down", ".*down_proj$", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "experts.gate_up_proj_bias", 1), "row [3, 6]");
        CHECK_TEXT_EQ(runs_of(&f, "experts.gate_up_proj_bias", 1), "6+6");
        CHECK_INT_EQ(entry_of(&f, "experts.gate_up_proj_bias")->outer, EXPERTS);
        CHECK_INT_EQ(entry_of(&f, "experts.gate_up_proj_bias")->inner, 1);
        CHECK_INT_EQ(entry_of(&f, "experts.down_proj_bias")->kind, TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "experts.scale")->kind, TP_REPLICATED);
        const tp_layer *layer = layer_of(&f, "experts");
        CHECK_INT_EQ(layer->divided_count, 1);
        CHECK_INT_EQ(layer->divided[0], last);
    }
    fixture_free(&f);
}

static void
test_experts_that_stay_replicated_are_no_layer(void)
{
    fixture f = fixture_new(2);
    add_experts(&f, false);
    const char *const whole[] = {"experts"};
    f.options.replicated = whole;
    f.options.replicated_count = 1;
    add_style(&f, "experts.gate_up_proj", "packed_colwise");
    add_style(&f, "experts.down_proj", "rowwise");
    add_style(&f, "experts", "moe_tp_experts");
    if (make_plan(&f)) {
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
        CHECK_INT_EQ(entry_of(&f, "experts.down_proj")->kind, TP_REPLICATED);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_what_gives_its_input_back_inside_of_experts_gives_a_share(void)
{
    for (int whole = 0; whole < 2; whole++) {
        const char *const names[] = {"experts"};
        fixture f = fixture_new(2);
        f.options.replicated = names;
        f.options.replicated_count = whole;
        add_experts(&f, false);
        add_module(&f, "experts.identity", TP_MODULE_OTHER, 0);
        add_style(&f, "experts.gate_up_proj", "packed_colwise");
        add_style(&f, "experts.down_proj", "rowwise");
        add_style(&f, "experts.identity", "moe_identity_expert");
        if (make_plan(&f)) {
            const tp_layer *layer = layer_of(&f, "experts.identity");
            CHECK(whole ? layer == NULL : layer->kind == TP_SHARE);
        }
        fixture_free(&f);
    }
}

static void
test_a_raw_parameter_with_an_element_per_head_follows_the_heads(void)
{
    fixture f = fixture_new(2);
    const int module =
        add_module(&f, "attn", TP_MODULE_OTHER, 2, "head_dim", 4, "num_heads", 3);
    add_shaped(&f, module, "sinks", 1, (int64_t[]){3}, -1);
    add_style(&f, "attn.sinks", "colwise");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "attn.sinks", 0), "column [2]");
        CHECK_TEXT_EQ(local_of(&f, "attn.sinks", 1), "column [1]");
        CHECK_INT_EQ(integer_of(&f, "attn", "num_heads")[1], 1);
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_a_raw_parameter_that_cannot_be_sharded_is_told_or_refused(void)
{
    fixture f = fixture_new(4);
    const int module = add_module(&f, "m", TP_MODULE_OTHER, 0);
    add_shaped(&f, module, "short", 1, (int64_t[]){3}, -1);
    add_style(&f, "m.short", "colwise");
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "m.short")->kind, TP_REPLICATED);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 1);
        CHECK_TEXT_HAS(tp_plan_message(f.plan, 0)->text, "cannot shard 'm.short' [3]");
        CHECK_TEXT_HAS(tp_plan_message(f.plan, 0)->text, "; it stays replicated");
    }
    fixture_free(&f);
    f = fixture_new(4);
    add_shaped(&f, add_module(&f, "m", TP_MODULE_OTHER, 0), "short", 1, (int64_t[]){3},
               -1);
    add_rule(&f, "r", "m.short", TP_PARTITION_COLUMN);
    CHECK_REFUSED(&f, "cannot shard 'm.short' [3] over 4 ranks by rule 'r'");
    f = fixture_new(2);
    add_experts(&f, false);
    add_spec(
        &f, "r", "experts.*",
        (tp_spec){.partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true});
    CHECK_REFUSED(&f, "leave gather_output out");
    f = fixture_new(2);
    add_shaped(&f, add_module(&f, "m", TP_MODULE_OTHER, 0), "v", 1, (int64_t[]){4}, -1);
    add_rule(&f, "r", "m.v", TP_PARTITION_ROW);
    CHECK_REFUSED(&f, "a parameter of 1 dimension has no input features");
}

static void
test_a_style_that_is_not_known_here_is_told_once(void)
{
    fixture f = fixture_new(2);
    add_linear(&f, "layers.0.up", 8, 8);
    add_linear(&f, "layers.1.up", 8, 8);
    add_style(&f, "layers.*.up", "grouped_gemm");
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "layers.0.up.weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 1);
        CHECK_TEXT_HAS(tp_plan_message(f.plan, 0)->text, "layers.*.up: grouped_gemm");
    }
    fixture_free(&f);
}

static void
test_an_adapter_on_experts_is_refused_with_the_layers_that_may_have_one(void)
{
    fixture f = fixture_new(2);
    add_linear(&f, "layers.0.q_proj.base_layer", 8, 8);
    add_linear(&f, "layers.0.v_proj.base_layer", 8, 8);
    add_module(&f, "layers.0.experts.base_layer.base_layer", TP_MODULE_OTHER, 0);
    add_linear(&f, "layers.1.q_proj.base_layer", 8, 8);
    add_linear(&f, "head.modules_to_save.default", 8, 8);
    add_style(&f, "layers.*.experts", "moe_tp_experts");
    CHECK_REFUSED(&f,
                  "with an adapter on 'layers.0.experts': leave that layer out of "
                  "the adapter's target_modules and target_parameters; in place of "
                  "'all-linear', which takes it in, name the others: "
                  "target_modules=['q_proj', 'v_proj']");
}

static void
test_a_pair_that_a_style_calls_one_piece_is_sharded_in_both_halves(void)
{
    fixture f = fixture_new(2);
    add_experts(&f, false);
    add_style(&f, "experts.gate_up_proj", "colwise");
    add_style(&f, "experts.down_proj", "rowwise");
    add_style(&f, "experts", "all_reduce");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "experts.gate_up_proj", 1), "3+3 9+3");
        CHECK_INT_EQ(layer_of(&f, "experts")->kind, TP_EXPERTS);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    }
    fixture_free(&f);
}

/* Experts that know their number, with a bias and without rules. */
static fixture
bare_fixture(int ranks, tp_module_kind kind, const char *key)
{
    fixture f = fixture_new(ranks);
    f.options.expert_partition = TP_EXPERTS_WHOLE;
    const int module = add_module(&f, "experts", kind, 1, key, EXPERTS);
    add_shaped(&f, module, "gate_up_proj", 3, (int64_t[]){EXPERTS, 2 * INNER, HIDDEN},
               -1);
    add_shaped(&f, module, "down_proj", 3, (int64_t[]){EXPERTS, HIDDEN, INNER}, -1);
    add_shaped(&f, module, "down_proj_bias", 2, (int64_t[]){EXPERTS, HIDDEN}, -1);
    return f;
}

static fixture
whole_fixture(int ranks, tp_module_kind kind, const char *key)
{
    fixture f = bare_fixture(ranks, kind, key);
    add_style(&f, "experts.gate_up_proj", "packed_colwise");
    add_style(&f, "experts.down_proj", "rowwise");
    add_style(&f, "experts", "moe_tp_experts");
    return f;
}

static void
test_each_rank_has_some_of_the_experts_where_options_ask_for_it(void)
{
    fixture f = whole_fixture(2, TP_MODULE_EXPERTS, "num_experts");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "experts.gate_up_proj", 0), "column [2, 12, 8]");
        CHECK_TEXT_EQ(local_of(&f, "experts.down_proj", 1), "column [1, 8, 6]");
        CHECK_TEXT_EQ(local_of(&f, "experts.down_proj_bias", 1), "column [1, 8]");
        CHECK_TEXT_EQ(runs_of(&f, "experts.down_proj", 1), "2+1");
        CHECK_INT_EQ(layer_of(&f, "experts")->kind, TP_WHOLE_EXPERTS);
        CHECK_INT_EQ(layer_of(&f, "experts")->divided_count, 0);
        CHECK_INT_EQ(tp_plan_integer_count(f.plan), 1);
        const tp_local_integer *number = tp_plan_integer(f.plan, 0);
        CHECK_TEXT_EQ(number->key, "num_experts");
        CHECK_INT_EQ(number->full, EXPERTS);
        CHECK_INT_EQ(number->values[0], 2);
        CHECK_INT_EQ(number->values[1], 1);
    }
    fixture_free(&f);
}

static void
test_experts_that_cannot_be_whole_are_refused(void)
{
    fixture f = whole_fixture(2, TP_MODULE_OTHER, "num_experts");
    CHECK_REFUSED(&f,
                  "'experts' (Any) is not known to be given tokens, indices of "
                  "experts and weights");
    f = whole_fixture(2, TP_MODULE_EXPERTS, "experts");
    CHECK_REFUSED(&f, "'experts' (Any) is not known to be given tokens");
    f = whole_fixture(4, TP_MODULE_EXPERTS, "num_experts");
    CHECK_REFUSED(&f, "'experts' has 3 experts for 4 ranks; write 'width'");
    f = whole_fixture(2, TP_MODULE_EXPERTS, "num_experts");
    add_shaped(&f, 0, "scale", 2, (int64_t[]){HIDDEN, HIDDEN}, -1);
    CHECK_REFUSED(&f, "'experts.scale' has no dimension of experts in front");
    f = whole_fixture(2, TP_MODULE_EXPERTS, "num_experts");
    add_shaped(&f, add_module(&f, "experts.norm", TP_MODULE_OTHER, 0), "weight", 1,
               (int64_t[]){HIDDEN}, -1);
    CHECK_REFUSED(&f, "'experts.norm.weight' is in a module inside of the experts");
    f = bare_fixture(2, TP_MODULE_EXPERTS, "num_experts");
    add_rule(&f, "up", ".*gate_up_proj$", TP_PARTITION_COLUMN);
    add_rule(&f, "down", ".*down_proj$", TP_PARTITION_ROW);
    CHECK_REFUSED(&f, "'experts.gate_up_proj' has a rule of partition_config, too");
    f = whole_fixture(2, TP_MODULE_EXPERTS, "num_experts");
    add_shaped(&f, add_module(&f, "other", TP_MODULE_OTHER, 0), "weight", 3,
               (int64_t[]){EXPERTS, HIDDEN, INNER}, 1);
    CHECK_REFUSED(&f, "'experts.down_proj' is tied to another parameter");
    f = fixture_new(2);
    f.options.expert_partition = TP_EXPERTS_WHOLE;
    add_matrix(&f, "q_proj", TP_MODULE_LINEAR, 16, 16);
    CHECK_REFUSED(&f, "no module of the model holds experts that are sharded");
}

/* So many experts of so many features, with rules that shard each. */
static fixture
auto_fixture(int ranks, int64_t experts, int64_t features)
{
    fixture f = fixture_new(ranks);
    f.options.expert_partition = TP_EXPERTS_AUTO;
    const int module =
        add_module(&f, "experts", TP_MODULE_EXPERTS, 1, "num_experts", experts);
    add_shaped(&f, module, "gate_up_proj", 3,
               (int64_t[]){experts, 2 * features, HIDDEN}, -1);
    add_shaped(&f, module, "down_proj", 3, (int64_t[]){experts, HIDDEN, features}, -1);
    add_style(&f, "experts.gate_up_proj", "packed_colwise");
    add_style(&f, "experts.down_proj", "rowwise");
    add_style(&f, "experts", "moe_tp_experts");
    return f;
}

static void
check_auto(fixture f, tp_kind kind, const char *why)
{
    if (make_plan(&f)) {
        CHECK_INT_EQ(layer_of(&f, "experts")->kind, kind);
        CHECK_TEXT_HAS(entry_of(&f, "experts.down_proj")->rule, why);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_auto_takes_whole_experts_where_shards_would_be_thin_and_says_why(void)
{
    check_auto(
        auto_fixture(2, 8, 240), TP_WHOLE_EXPERTS,
        "expert_partition: experts by auto, since shards of each would have fewer "
        "than 128 features, and each rank has at least 4 experts");
    check_auto(
        auto_fixture(2, 8, 256), TP_EXPERTS,
        "down_proj: rowwise; width by auto, since a rank's shard of an expert of "
        "'experts' has 128 features, not fewer than 128");
    check_auto(auto_fixture(2, 9, 64), TP_EXPERTS,
               "the 9 experts of 'experts' do not divide by 2 ranks");
    check_auto(auto_fixture(2, 6, 64), TP_EXPERTS,
               "each rank has 3 of the experts of 'experts', fewer than 4");
    fixture f = auto_fixture(2, 8, 64);
    add_shaped(&f, add_module(&f, "experts.norm", TP_MODULE_OTHER, 0), "weight", 1,
               (int64_t[]){HIDDEN}, -1);
    check_auto(f, TP_EXPERTS,
               "since 'experts.norm.weight' is in a module inside of the experts");
}

static void
test_auto_without_experts_is_no_error(void)
{
    fixture f = fixture_new(2);
    f.options.expert_partition = TP_EXPERTS_AUTO;
    add_linear(&f, "q_proj", 16, 16);
    add_style(&f, "q_proj", "colwise");
    CHECK(make_plan(&f));
    fixture_free(&f);
}

static void
test_experts_that_are_given_blocks_of_rows_are_layers_of_their_own(void)
{
    fixture f = fixture_new(2);
    f.options.expert_partition = TP_EXPERTS_WHOLE;
    const int module =
        add_module(&f, "experts", TP_MODULE_EXPERT_BLOCKS, 1, "num_experts", EXPERTS);
    add_shaped(&f, module, "gate_up_proj", 3, (int64_t[]){EXPERTS, HIDDEN, 2 * INNER},
               -1);
    add_shaped(&f, module, "down_proj", 3, (int64_t[]){EXPERTS, INNER, HIDDEN}, -1);
    add_style(&f, "experts.gate_up_proj", "packed_rowwise");
    add_style(&f, "experts.down_proj", "colwise");
    add_style(&f, "experts", "moe_tp_experts");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "experts.down_proj", 0), "column [2, 6, 8]");
        CHECK_INT_EQ(layer_of(&f, "experts")->kind, TP_WHOLE_EXPERT_BLOCKS);
        CHECK_INT_EQ(tp_plan_integer_count(f.plan), 1);
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_auto_takes_whole_experts_where_shards_would_be_thin_and_says_why);
    RUN(test_auto_without_experts_is_no_error);
    RUN(test_experts_that_are_given_blocks_of_rows_are_layers_of_their_own);
    RUN(test_each_rank_has_some_of_the_experts_where_options_ask_for_it);
    RUN(test_experts_that_cannot_be_whole_are_refused);
    RUN(test_an_adapter_on_experts_is_refused_with_the_layers_that_may_have_one);
    RUN(test_a_pair_that_a_style_calls_one_piece_is_sharded_in_both_halves);
    RUN(test_experts_are_sharded_inside_each_expert_and_their_module_sums);
    RUN(test_a_style_names_a_dimension_where_experts_are_transposed);
    RUN(test_gate_and_up_that_take_turns_are_sharded_in_pairs);
    RUN(test_the_bias_of_a_viewed_weight_is_viewed_alike);
    RUN(test_biases_of_experts_are_sharded_or_added_in_shares);
    RUN(test_experts_that_stay_replicated_are_no_layer);
    RUN(test_what_gives_its_input_back_inside_of_experts_gives_a_share);
    RUN(test_a_raw_parameter_with_an_element_per_head_follows_the_heads);
    RUN(test_a_raw_parameter_that_cannot_be_sharded_is_told_or_refused);
    RUN(test_a_style_that_is_not_known_here_is_told_once);
    return check_result();
}
