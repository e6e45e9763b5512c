/* SPDX-License-Identifier: Apache-2.0 */
#include "plan/layer_facts.h"
#include "plan_llama.h"

static int
index_of(const fixture *f, const char *name)
{
    const tp_layer *found = layer_of(f, name);
    return found == NULL ? 0 : (int)(found - tp_plan_layer(f->plan, 0));
}

/* "a b c": the names of the block of a layer. */
static const char *
block_of(const fixture *f, const char *name)
{
    static char text[512];
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = NULL;
    tp_names names = {NULL, 0};
    size_t used = 0;
    text[0] = '\0';
    CHECK_OK(tp_arena_new(&arena, &err), &err);
    CHECK_OK(tp_layer_block(f->plan, index_of(f, name), arena, &names, &err), &err);
    for (int i = 0; i < names.count; i++)
        used += (size_t)snprintf(text + used, sizeof(text) - used, "%s%s",
                                 i > 0 ? " " : "", names.names[i]);
    tp_arena_free(arena);
    return text;
}

static void
test_the_block_of_a_layer_is_the_module_that_holds_it(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 2, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(block_of(&f, "model.layers.1.mlp.up_proj"), "model.layers.*.mlp");
        /* The model holds layers that are not its own children. */
        CHECK_TEXT_EQ(block_of(&f, "lm_head"), "lm_head");
        CHECK_TEXT_EQ(block_of(&f, "model.embed_tokens"), "model.embed_tokens");
    }
    fixture_free(&f);
}

static void
test_a_list_is_no_block_and_equal_names_come_once(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "layers", TP_MODULE_OTHER, 0);
    add_module(&f, "layers.0", TP_MODULE_OTHER, 0);
    add_linear(&f, "layers.0.0", 8, 4);
    add_linear(&f, "layers.0.1", 4, 8);
    add_rule(&f, "a", ".*\\.0\\.weight", TP_PARTITION_COLUMN);
    add_rule(&f, "b", ".*\\.1\\.weight", TP_PARTITION_ROW);
    if (make_plan(&f))
        CHECK_TEXT_EQ(block_of(&f, "layers.0.0"), "layers.*.*");
    fixture_free(&f);
}

static void
test_features_are_those_of_the_weight(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        tp_features found;
        tp_layer_features(f.plan, index_of(&f, "lm_head"), &found);
        CHECK_INT_EQ(found.size, 33);
        CHECK_INT_EQ(found.layout->shards[0].width, 16);
        CHECK(tp_layer_gathers_weight(layer_of(&f, "lm_head")));
        CHECK(tp_layer_has_full_output(layer_of(&f, "lm_head")));
        CHECK(tp_layer_has_full_output(layer_of(&f, "model.layers.0.mlp.down_proj")));
        CHECK(!tp_layer_has_full_output(layer_of(&f, "model.layers.0.mlp.up_proj")));
        CHECK(!tp_layer_gathers_weight(layer_of(&f, "model.layers.0.mlp.up_proj")));
        CHECK(!tp_layer_is_heuristic(f.plan, index_of(&f, "lm_head")));
    }
    fixture_free(&f);
}

static void
test_a_pair_that_names_shard_in_an_untried_model_is_heuristic(void)
{
    fixture f = fixture_new(2);
    f.options.families = true;
    f.options.heuristics = true;
    f.facts.model_type = "never_tried";
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "mlp.fc1", 32, 16);
    add_linear(&f, "mlp.fc2", 16, 32);
    if (make_plan(&f)) {
        CHECK(tp_layer_is_heuristic(f.plan, index_of(&f, "mlp.fc1")));
        CHECK(tp_layer_is_heuristic(f.plan, index_of(&f, "mlp.fc2")));
    }
    fixture_free(&f);
}

static void
test_features_of_attention_are_its_heads_and_of_a_latent_its_positions(void)
{
    fixture f = fixture_new(2);
    tp_features found;
    f.options.families = f.options.heuristics = true;
    f.facts.model_type = "bloom";
    add_module(&f, "attn", TP_MODULE_OTHER, 2, "num_heads", 3, "head_dim", 4);
    add_linear(&f, "attn.query_key_value", 36, 12);
    add_linear(&f, "attn.dense", 12, 12);
    if (make_plan(&f)) {
        tp_layer_features(f.plan, index_of(&f, "attn"), &found);
        CHECK_INT_EQ(found.size, 3);
        CHECK_INT_EQ(found.layout->shards[0].width, 2);
        /* It is not sharded itself, so that the layers in it say what the block is. */
        CHECK_TEXT_EQ(block_of(&f, "attn.dense"), "attn");
    }
    fixture_free(&f);

    f = fixture_new(2);
    add_module(&f, "attn", TP_MODULE_OTHER, 3, "num_heads", 4, "kv_lora_rank", 16,
               "qk_rope_head_dim", 8);
    add_linear(&f, "attn.kv_a_proj_with_mqa", 24, 32);
    add_style(&f, "attn.kv_a_proj_with_mqa", "mla_kv_a_proj");
    if (make_plan(&f)) {
        tp_layer_features(f.plan, index_of(&f, "attn.kv_a_proj_with_mqa"), &found);
        CHECK(found.layout == NULL);
        CHECK_INT_EQ(found.size, 24);
        CHECK_INT_EQ(found.run.start, 16);
        CHECK_INT_EQ(found.run.length, 8);
        CHECK_INT_EQ(found.run.holders, 2);
        CHECK(!tp_layer_is_heuristic(f.plan, 0));
        CHECK(!tp_layer_gathers_weight(tp_plan_layer(f.plan, 0)));
    }
    fixture_free(&f);
}

/* Experts [3, features, 8], sharded by a rule or by their names. */
static fixture
experts_new(const char *model_type, bool rules)
{
    fixture f = fixture_new(2);
    f.options.families = f.options.heuristics = !rules;
    f.facts.model_type = model_type;
    add_linear(&f, "router", 3, 8);
    const int module = add_module(&f, "mlp.experts", TP_MODULE_OTHER, 0);
    add_shaped(&f, module, "gate_up_proj", 3, (int64_t[]){3, 12, 8}, -1);
    add_shaped(&f, module, "down_proj", 3, (int64_t[]){3, 8, 6}, -1);
    if (rules) {
        add_style(&f, "mlp.experts.gate_up_proj", "packed_colwise");
        add_style(&f, "mlp.experts.down_proj", "rowwise");
        add_style(&f, "mlp.experts", "moe_tp_experts");
    }
    return f;
}

static void
test_experts_are_heuristic_where_a_weight_of_theirs_is(void)
{
    for (int rules = 0; rules < 2; rules++) {
        fixture f = experts_new("never_tried", rules);
        if (make_plan(&f)) {
            tp_features found;
            const int layer = index_of(&f, "mlp.experts");
            CHECK_INT_EQ(tp_plan_layer(f.plan, layer)->kind, TP_EXPERTS);
            CHECK(tp_layer_is_heuristic(f.plan, layer) == !rules);
            CHECK(tp_layer_has_full_output(tp_plan_layer(f.plan, layer)));
            tp_layer_features(f.plan, layer, &found);
            CHECK_INT_EQ(found.size, 0);
            CHECK(found.layout == NULL);
        }
        fixture_free(&f);
    }
}

static void
test_a_heuristic_weight_elsewhere_makes_no_experts_heuristic(void)
{
    fixture f = experts_new("never_tried", true);
    f.options.families = f.options.heuristics = true;
    add_module(&f, "mlp2", TP_MODULE_OTHER, 0);
    add_linear(&f, "mlp2.fc1", 32, 16);
    add_linear(&f, "mlp2.fc2", 16, 32);
    if (make_plan(&f)) {
        CHECK(tp_layer_is_heuristic(f.plan, index_of(&f, "mlp2.fc1")));
        CHECK(!tp_layer_is_heuristic(f.plan, index_of(&f, "mlp.experts")));
    }
    fixture_free(&f);
}

static void
test_an_individually_sharded_layer_is_a_block_of_its_own(void)
{
    fixture f = fixture_new(2);
    f.options.families = f.options.heuristics = f.options.large_layers = true;
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "mlp.fc1", 48, 16);
    add_linear(&f, "mlp.fc2", 16, 48);
    add_linear(&f, "mlp.other", 48, 16);
    if (make_plan(&f)) {
        CHECK(layer_of(&f, "mlp.other")->is_large);
        CHECK(!tp_layer_is_heuristic(f.plan, index_of(&f, "mlp.other")));
        CHECK_TEXT_EQ(block_of(&f, "mlp.fc1"), "mlp");
        CHECK_TEXT_EQ(block_of(&f, "mlp.other"), "mlp");
    }
    fixture_free(&f);
}

static void
test_layers_of_the_model_itself_are_blocks_of_their_own(void)
{
    fixture f = fixture_new(2);
    f.options.families = f.options.heuristics = f.options.large_layers = true;
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_linear(&f, "fc1", 48, 16);
    add_linear(&f, "fc2", 16, 48);
    add_linear(&f, "take", 16, 48);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(block_of(&f, "fc1"), "fc1 fc2");
        CHECK(tp_layer_is_heuristic(f.plan, index_of(&f, "fc1")));
        CHECK(layer_of(&f, "take")->is_large);
        CHECK(layer_of(&f, "take")->split_input);
        CHECK(!tp_layer_is_heuristic(f.plan, index_of(&f, "take")));
    }
    fixture_free(&f);
}

static void
test_whole_experts_have_full_outputs_and_are_no_guess_of_names(void)
{
    for (int blocks = 0; blocks < 2; blocks++) {
        fixture f = fixture_new(2);
        f.options.expert_partition = TP_EXPERTS_WHOLE;
        add_module(&f, "experts", blocks ? TP_MODULE_EXPERT_BLOCKS : TP_MODULE_EXPERTS,
                   1, "num_experts", 4);
        add_shaped(&f, 0, "gate_up_proj", 3, (int64_t[]){4, 12, 8}, -1);
        add_shaped(&f, 0, "down_proj", 3, (int64_t[]){4, 8, 6}, -1);
        add_style(&f, "experts.gate_up_proj", "packed_colwise");
        add_style(&f, "experts.down_proj", "rowwise");
        add_style(&f, "experts", "moe_tp_experts");
        if (make_plan(&f)) {
            tp_features found;
            const tp_layer *layer = layer_of(&f, "experts");
            CHECK_INT_EQ(layer->kind,
                         blocks ? TP_WHOLE_EXPERT_BLOCKS : TP_WHOLE_EXPERTS);
            CHECK(tp_layer_has_full_output(layer));
            CHECK(!tp_layer_gathers_weight(layer));
            CHECK(!tp_layer_is_heuristic(f.plan, index_of(&f, "experts")));
            tp_layer_features(f.plan, index_of(&f, "experts"), &found);
            CHECK_INT_EQ(found.size, 4); /* the experts */
            CHECK_INT_EQ(found.layout->shards[0].width, 2);
        }
        fixture_free(&f);
    }
}

int
main(void)
{
    RUN(test_the_block_of_a_layer_is_the_module_that_holds_it);
    RUN(test_a_list_is_no_block_and_equal_names_come_once);
    RUN(test_features_are_those_of_the_weight);
    RUN(test_a_pair_that_names_shard_in_an_untried_model_is_heuristic);
    RUN(test_features_of_attention_are_its_heads_and_of_a_latent_its_positions);
    RUN(test_experts_are_heuristic_where_a_weight_of_theirs_is);
    RUN(test_a_heuristic_weight_elsewhere_makes_no_experts_heuristic);
    RUN(test_an_individually_sharded_layer_is_a_block_of_its_own);
    RUN(test_layers_of_the_model_itself_are_blocks_of_their_own);
    RUN(test_whole_experts_have_full_outputs_and_are_no_guess_of_names);
    return check_result();
}
