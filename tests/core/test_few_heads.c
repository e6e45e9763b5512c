/* SPDX-License-Identifier: Apache-2.0 */
/* Attention of a small tower that has fewer heads than there are ranks. */
#include "plan_llama.h"

/* Beside a llama of 4 heads, attention of 3 heads of `head` over its own hidden size.
 */
static void
add_tower(fixture *f, int layers, int head)
{
    static const char *const leaves[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    char name[64];
    add_module(f, "tower", TP_MODULE_OTHER, 0);
    for (int i = 0; i < layers; i++) {
        snprintf(name, sizeof(name), "tower.%d", i);
        add_module(f, name, TP_MODULE_OTHER, 0);
        snprintf(name, sizeof(name), "tower.%d.self_attn", i);
        add_module(f, name, TP_MODULE_OTHER, 2, "num_heads", 3, "head_dim", head);
        for (int j = 0; j < 4; j++) {
            snprintf(name, sizeof(name), "tower.%d.self_attn.%s", i, leaves[j]);
            const int weight = add_linear(f, name, 3 * head, 3 * head);
            add_vector(f, weight, "bias", 3 * head);
        }
        snprintf(name, sizeof(name), "tower.%d.self_attn.q_norm", i);
        const int norm = add_module(f, name, TP_MODULE_OTHER, 0);
        add_shaped(f, norm, "weight", 1, (int64_t[]){head}, -1);
        snprintf(name, sizeof(name), "tower.%d.up", i);
        add_linear(f, name, 8, 3 * head);
        snprintf(name, sizeof(name), "tower.%d.down", i);
        add_linear(f, name, 3 * head, 8);
    }
}

static void
add_tower_styles(fixture *f)
{
    add_attention_styles(f, "tower.*.self_attn");
    add_style(f, "tower.*.self_attn.q_norm", "replicated_with_grad_allreduce");
    add_style(f, "tower.*.up", "colwise");
    add_style(f, "tower.*.down", "rowwise");
}

static void
test_a_small_tower_stays_replicated_with_one_message(void)
{
    fixture f = fixture_new(4);
    add_llama(&f, 4, false);
    add_tower(&f, 2, 2);
    add_llama_styles(&f);
    add_tower_styles(&f);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "tower.0.self_attn.q_proj.weight", 0),
                      "replicated [6, 6]");
        CHECK_TEXT_EQ(local_of(&f, "tower.1.self_attn.o_proj.weight", 3),
                      "replicated [6, 6]");
        CHECK_TEXT_EQ(local_of(&f, "tower.1.self_attn.q_proj.bias", 3),
                      "replicated [6]");
        /* Not summed: every rank has the full gradient. */
        CHECK_TEXT_EQ(local_of(&f, "tower.0.self_attn.q_norm.weight", 0),
                      "replicated [2]");
        CHECK(layer_of(&f, "tower.0.self_attn.q_proj") == NULL);
        CHECK(integer_of(&f, "tower.0.self_attn", "num_heads") == NULL);
        CHECK_TEXT_EQ(local_of(&f, "tower.0.up.weight", 0), "column [2, 6]");
        CHECK_TEXT_EQ(local_of(&f, "model.layers.0.self_attn.q_proj.weight", 0),
                      "column [4, 16]");
        if (CHECK_INT_EQ(tp_plan_message_count(f.plan), 1))
            CHECK_TEXT_EQ(tp_plan_message(f.plan, 0)->text,
                          "tower.*.self_attn stays replicated: it has 3 query and 3 "
                          "key/value heads, and cannot be sharded over 4 ranks");
    }
    fixture_free(&f);
}

static void
test_a_tower_that_is_much_of_the_model_is_refused(void)
{
    fixture f = fixture_new(4);
    add_llama(&f, 1, false);
    add_tower(&f, 2, 4);
    add_llama_styles(&f);
    add_tower_styles(&f);
    CHECK_REFUSED(&f, "has 3 query and 3 key/value heads of 4");
}

static void
test_a_rule_of_the_user_is_refused_in_a_small_tower_too(void)
{
    fixture f = fixture_new(4);
    add_llama(&f, 4, false);
    add_tower(&f, 1, 2);
    add_rule(&f, "mine", "tower.*q_proj", TP_PARTITION_COLUMN);
    add_rule(&f, "mine too", "tower.*o_proj", TP_PARTITION_ROW);
    CHECK_REFUSED(&f, "'tower.0.self_attn' has 3 query and 3 key/value heads of 2");
}

/* What takes the heads may be outside of the module that makes them. */
static void
test_attention_without_its_output_layer_is_refused(void)
{
    fixture f = fixture_new(4);
    add_llama(&f, 4, false);
    add_tower(&f, 1, 2);
    add_llama_styles(&f);
    add_style(&f, "tower.*.self_attn.q_proj", "colwise");
    CHECK_REFUSED(&f, "'tower.0.self_attn' has 3 query and 3 key/value heads of 2");
}

static void
test_enough_heads_are_sharded(void)
{
    fixture f = fixture_new(3);
    add_llama(&f, 4, false);
    add_tower(&f, 1, 2);
    add_llama_styles(&f);
    add_tower_styles(&f);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "tower.0.self_attn.q_proj.weight", 0),
                      "column [2, 6]");
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    }
    fixture_free(&f);
}

/* Attention inside of attention, in a model that is no more than these, and a weight
 * that is there twice. */
static void
test_attention_inside_of_attention_is_told_as_one(void)
{
    static const char *const leaves[] = {"q_proj", "o_proj"};
    fixture f = fixture_new(4);
    char name[64];
    add_llama(&f, 4, false);
    int weight = -1;
    for (int inner = 0; inner < 2; inner++) {
        const char *around = inner ? "attn.inner" : "attn";
        add_module(&f, around, TP_MODULE_OTHER, 2, "num_heads", 3, "head_dim", 2);
        for (int i = 0; i < 2; i++) {
            snprintf(name, sizeof(name), "%s.%s", around, leaves[i]);
            const int module = add_module(&f, name, TP_MODULE_LINEAR, 0);
            weight = add_shaped(&f, module, "weight", 2, (int64_t[]){6, 6},
                                inner && i == 1 ? weight : -1);
        }
    }
    add_llama_styles(&f);
    add_style(&f, "attn.q_proj", "colwise");
    add_style(&f, "attn.o_proj", "rowwise");
    add_style(&f, "attn.inner.q_proj", "colwise");
    add_style(&f, "attn.inner.o_proj", "rowwise");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "attn.inner.q_proj.weight", 0), "replicated [6, 6]");
        CHECK_TEXT_EQ(local_of(&f, "attn.o_proj.weight", 0), "replicated [6, 6]");
        if (CHECK_INT_EQ(tp_plan_message_count(f.plan), 1))
            CHECK_TEXT_HAS(tp_plan_message(f.plan, 0)->text,
                           "attn stays replicated: it has 3 query");
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_a_small_tower_stays_replicated_with_one_message);
    RUN(test_a_tower_that_is_much_of_the_model_is_refused);
    RUN(test_a_rule_of_the_user_is_refused_in_a_small_tower_too);
    RUN(test_attention_without_its_output_layer_is_refused);
    RUN(test_enough_heads_are_sharded);
    RUN(test_attention_inside_of_attention_is_told_as_one);
    return check_result();
}
