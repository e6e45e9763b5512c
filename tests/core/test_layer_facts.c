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

int
main(void)
{
    RUN(test_the_block_of_a_layer_is_the_module_that_holds_it);
    RUN(test_a_list_is_no_block_and_equal_names_come_once);
    RUN(test_features_are_those_of_the_weight);
    RUN(test_a_pair_that_names_shard_in_an_untried_model_is_heuristic);
    return check_result();
}
