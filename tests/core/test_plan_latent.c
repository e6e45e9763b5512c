/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

/* Latent attention of 4 heads: queries of 12 + 8, a latent of 16 and positions of 8. */
static void
add_latent(fixture *f, bool says_size)
{
    add_module(f, "attn", TP_MODULE_OTHER, says_size ? 3 : 2, "num_heads", 4,
               "kv_lora_rank", 16, "qk_rope_head_dim", 8);
    add_fact(f, "num_attention_heads", 4);
    add_fact(f, "head_dim", 8);
    /* As many features as q, k and v of 4 heads of 8 would have. */
    add_linear(f, "attn.q_proj", 96, 32);
    add_linear(f, "attn.kv_a_proj_with_mqa", 24, 32);
    add_linear(f, "attn.kv_b_proj", 128, 16);
    add_linear(f, "attn.o_proj", 32, 64);
    add_style(f, "attn.q_proj", "colwise");
    add_style(f, "attn.kv_a_proj_with_mqa", "mla_kv_a_proj");
    add_style(f, "attn.kv_b_proj", "colwise");
    add_style(f, "attn.o_proj", "rowwise");
}

static void
test_the_positions_of_a_latent_are_a_run_of_a_full_projection(void)
{
    fixture f = fixture_new(2);
    add_latent(&f, true);
    if (make_plan(&f)) {
        const tp_layer *layer = layer_of(&f, "attn.kv_a_proj_with_mqa");
        CHECK_INT_EQ(entry_of(&f, "attn.kv_a_proj_with_mqa.weight")->kind,
                     TP_REPLICATED);
        CHECK_INT_EQ(layer->kind, TP_ROPE);
        CHECK_INT_EQ(layer->run_start, 16);
        CHECK_INT_EQ(layer->run_length, 8);
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 4);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_queries_beside_a_latent_are_never_taken_for_a_fused_weight(void)
{
    fixture f = fixture_new(2);
    add_latent(&f, true);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.q_proj.weight", 0), "0+48");
        CHECK_TEXT_EQ(runs_of(&f, "attn.q_proj.weight", 1), "48+48");
        CHECK_TEXT_EQ(runs_of(&f, "attn.kv_b_proj.weight", 1), "64+64");
        CHECK_INT_EQ(integer_of(&f, "attn", "num_heads")[0], 2);
    }
    fixture_free(&f);
}

static void
test_the_size_of_the_positions_may_come_from_the_configuration(void)
{
    fixture f = fixture_new(2);
    add_latent(&f, false);
    add_fact(&f, "qk_rope_head_dim", 8);
    if (make_plan(&f))
        CHECK_INT_EQ(layer_of(&f, "attn.kv_a_proj_with_mqa")->run_length, 8);
    fixture_free(&f);
}

static void
test_positions_of_unknown_size_are_refused_naming_both_places(void)
{
    fixture f = fixture_new(2);
    add_latent(&f, false);
    CHECK_REFUSED(&f, "neither 'attn' nor the configuration has a qk_rope_head_dim");
}

static void
test_fewer_heads_than_ranks_are_refused_whatever_their_size(void)
{
    fixture f = fixture_new(8);
    add_latent(&f, true);
    CHECK_REFUSED(&f, "4 query heads cannot be spread over 8 ranks");
}

static void
test_latent_attention_that_is_replicated_shares_nothing(void)
{
    fixture f = fixture_new(2);
    const char *const whole[] = {"attn"};
    f.options.replicated = whole;
    f.options.replicated_count = 1;
    add_latent(&f, true);
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
    fixture_free(&f);
}

/* The projection of positions is a linear layer of a module with their size. */
static void
test_a_style_of_positions_on_anything_else_changes_nothing(void)
{
    for (int i = 0; i < 2; i++) {
        fixture f = fixture_new(2);
        add_fact(&f, "qk_rope_head_dim", 8);
        if (i == 0) {
            add_module(&f, "attn", TP_MODULE_OTHER, 0);
            add_matrix(&f, "attn.kv_a", TP_MODULE_EMBEDDING, 24, 32);
            add_style(&f, "attn.kv_a", "mla_kv_a_proj");
        } else {
            add_linear(&f, "kv_a", 24, 32);
            add_style(&f, "kv_a", "mla_kv_a_proj");
        }
        if (make_plan(&f))
            CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
        fixture_free(&f);
    }
}

static void
test_more_positions_than_features_are_refused(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "attn", TP_MODULE_OTHER, 1, "qk_rope_head_dim", 24);
    add_linear(&f, "attn.kv_a", 24, 32);
    add_style(&f, "attn.kv_a", "mla_kv_a_proj");
    CHECK_REFUSED(&f, "between 1 and the 24 features of 'attn.kv_a'");
}

int
main(void)
{
    RUN(test_the_positions_of_a_latent_are_a_run_of_a_full_projection);
    RUN(test_queries_beside_a_latent_are_never_taken_for_a_fused_weight);
    RUN(test_the_size_of_the_positions_may_come_from_the_configuration);
    RUN(test_positions_of_unknown_size_are_refused_naming_both_places);
    RUN(test_fewer_heads_than_ranks_are_refused_whatever_their_size);
    RUN(test_latent_attention_that_is_replicated_shares_nothing);
    RUN(test_a_style_of_positions_on_anything_else_changes_nothing);
    RUN(test_more_positions_than_features_are_refused);
    return check_result();
}
