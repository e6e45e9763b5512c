/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_llama.h"

static fixture
llama_with_whole(const char *const *whole, int count, bool tied)
{
    fixture f = fixture_new(2);
    add_llama(&f, 2, tied);
    add_llama_styles(&f);
    f.options.replicated = whole;
    f.options.replicated_count = count;
    return f;
}

static void
test_everything_below_a_module_that_is_replicated_stays_replicated(void)
{
    const char *const whole[] = {"model.layers.*.self_attn"};
    fixture f = llama_with_whole(whole, 1, false);
    if (make_plan(&f)) {
        const tp_entry *query = entry_of(&f, "model.layers.1.self_attn.q_proj.weight");
        CHECK_INT_EQ(query->kind, TP_REPLICATED);
        CHECK_INT_EQ(query->dim, -1);
        CHECK_INT_EQ(query->source, TP_FROM_NOTHING);
        CHECK_TEXT_EQ(query->rule, "replicated");
        CHECK(layer_of(&f, "model.layers.0.self_attn.o_proj") == NULL);
        CHECK_INT_EQ(tp_plan_integer_count(f.plan), 0);
        CHECK_INT_EQ(entry_of(&f, "model.layers.1.mlp.up_proj.weight")->kind,
                     TP_COLUMN);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_one_layer_can_be_replicated_by_its_index(void)
{
    const char *const whole[] = {"model.layers.1", "lm_head"};
    fixture f = llama_with_whole(whole, 2, false);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "model.layers.1.mlp.up_proj.weight")->kind,
                     TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.mlp.up_proj.weight")->kind,
                     TP_COLUMN);
        CHECK_INT_EQ(entry_of(&f, "lm_head.weight")->kind, TP_REPLICATED);
        CHECK(integer_of(&f, "model.layers.1.self_attn", "num_key_value_groups") ==
              NULL);
    }
    fixture_free(&f);
}

static void
test_a_replicated_head_keeps_the_embedding_replicated(void)
{
    const char *const whole[] = {"lm_head"};
    fixture f = llama_with_whole(whole, 1, true);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "model.embed_tokens.weight")->kind, TP_REPLICATED);
        CHECK(layer_of(&f, "model.embed_tokens") == NULL);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_a_gradient_below_a_module_that_is_replicated_is_not_summed(void)
{
    const char *const whole[] = {"model.layers.*.self_attn"};
    fixture f = llama_with_whole(whole, 1, false);
    const int norm =
        add_module(&f, "model.layers.0.self_attn.q_norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, norm, "weight", 1, (int64_t[]){4}, -1);
    add_style(&f, "layers.*.self_attn.q_norm", "replicated_with_grad_allreduce");
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.self_attn.q_norm.weight")->kind,
                     TP_REPLICATED);
    fixture_free(&f);
}

static void
test_a_default_shards_nothing_that_is_replicated(void)
{
    const char *const whole[] = {"model.embed_tokens"};
    fixture f = fixture_new(2);
    add_llama(&f, 1, false);
    add_preset(&f, "llama");
    f.options.replicated = whole;
    f.options.replicated_count = 1;
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "model.embed_tokens.weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "lm_head.weight")->kind, TP_COLUMN);
    }
    fixture_free(&f);
}

static void
test_a_name_that_no_module_has_is_refused_with_the_nearest(void)
{
    const char *const whole[] = {"lm_head", "model.layers.*.mpl"};
    fixture f = llama_with_whole(whole, 2, false);
    CHECK_REFUSED(
        &f,
        "replicated[1]: no module is called 'model.layers.*.mpl'; did you mean "
        "'model.layers.*.mlp'?");
}

static void
test_individual_layers_are_sharded_with_full_activations_between_them(void)
{
    const char *const apart[] = {"model.layers.*.self_attn"};
    fixture f = llama_with_whole(NULL, 0, false);
    f.options.individual = apart;
    f.options.individual_count = 1;
    const int norm =
        add_module(&f, "model.layers.0.self_attn.q_norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, norm, "weight", 1, (int64_t[]){4}, -1);
    add_style(&f, "layers.*.self_attn.q_norm", "replicated_with_grad_allreduce");
    if (make_plan(&f)) {
        const tp_layer *key = layer_of(&f, "model.layers.1.self_attn.k_proj");
        const tp_layer *out = layer_of(&f, "model.layers.1.self_attn.o_proj");
        CHECK(key->kind == TP_COLUMN && key->gather_output);
        CHECK(out->kind == TP_ROW && out->split_input);
        CHECK_TEXT_EQ(runs_of(&f, "model.layers.1.self_attn.k_proj.weight", 1), "4+4");
        CHECK_INT_EQ(tp_plan_integer_count(f.plan), 0);
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.self_attn.q_norm.weight")->kind,
                     TP_REPLICATED);
        CHECK(!layer_of(&f, "model.layers.1.mlp.up_proj")->gather_output);
    }
    fixture_free(&f);
}

static void
test_individual_layers_are_sharded_also_where_heads_do_not_fit(void)
{
    const char *const apart[] = {"model.layers.*.self_attn"};
    fixture f = llama_with_whole(NULL, 0, false);
    f.options.individual = apart;
    f.options.individual_count = 1;
    f.options.ranks = 8; /* of 4 heads */
    if (make_plan(&f))
        CHECK_TEXT_EQ(local_of(&f, "model.layers.0.self_attn.q_proj.weight", 7),
                      "column [2, 16]");
    fixture_free(&f);
}

static void
test_what_is_no_layer_of_an_individual_module_stays_replicated(void)
{
    const char *const apart[] = {"moe"};
    fixture f = fixture_new(2);
    add_module(&f, "moe", TP_MODULE_OTHER, 0);
    const int experts = add_module(&f, "moe.experts", TP_MODULE_OTHER, 0);
    add_shaped(&f, experts, "up_proj", 3, (int64_t[]){3, 8, 4}, -1);
    add_linear(&f, "moe.shared", 8, 4);
    add_style(&f, "moe.experts.up_proj", "colwise");
    add_style(&f, "moe.experts", "moe_tp_experts");
    add_style(&f, "moe.shared", "colwise");
    f.options.individual = apart;
    f.options.individual_count = 1;
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "moe.experts.up_proj")->kind, TP_REPLICATED);
        CHECK(layer_of(&f, "moe.experts") == NULL);
        CHECK(layer_of(&f, "moe.shared")->gather_output);
    }
    fixture_free(&f);
}

static void
test_replicated_goes_before_individual(void)
{
    const char *const both[] = {"model.layers.*.mlp"};
    fixture f = llama_with_whole(both, 1, false);
    f.options.individual = both;
    f.options.individual_count = 1;
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.mlp.up_proj.weight")->kind,
                     TP_REPLICATED);
    fixture_free(&f);
}

static void
test_a_module_that_nothing_is_called_like_is_refused_without_a_proposal(void)
{
    const char *const whole[] = {"0123456789"};
    fixture f = llama_with_whole(whole, 1, false);
    const int refused = try_plan(&f);
    CHECK_INT_EQ(refused, -1);
    CHECK_TEXT_HAS(tp_error_text(&f.err), "no module is called '0123456789'");
    CHECK(strstr(tp_error_text(&f.err), "did you mean") == NULL);
    fixture_free(&f);
}

static void
test_a_model_without_modules_is_refused(void)
{
    fixture f = fixture_new(2);
    CHECK_REFUSED(&f, "the model has no modules, expected at least ''");
}

int
main(void)
{
    RUN(test_individual_layers_are_sharded_with_full_activations_between_them);
    RUN(test_individual_layers_are_sharded_also_where_heads_do_not_fit);
    RUN(test_what_is_no_layer_of_an_individual_module_stays_replicated);
    RUN(test_replicated_goes_before_individual);
    RUN(test_everything_below_a_module_that_is_replicated_stays_replicated);
    RUN(test_one_layer_can_be_replicated_by_its_index);
    RUN(test_a_replicated_head_keeps_the_embedding_replicated);
    RUN(test_a_gradient_below_a_module_that_is_replicated_is_not_summed);
    RUN(test_a_default_shards_nothing_that_is_replicated);
    RUN(test_a_name_that_no_module_has_is_refused_with_the_nearest);
    RUN(test_a_module_that_nothing_is_called_like_is_refused_without_a_proposal);
    RUN(test_a_model_without_modules_is_refused);
    return check_result();
}
