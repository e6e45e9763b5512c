/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

enum { EXPERTS = 3, HIDDEN = 8, INNER = 6 };

static fixture
experts_new(const char *model_type)
{
    fixture f = fixture_new(2);
    f.options.families = f.options.heuristics = true;
    f.facts.model_type = model_type;
    return f;
}

/* gate_up and down in one module; `turned`: [experts, in, out]. */
static void
add_tensors(fixture *f, bool turned, int inner)
{
    const int64_t up[] = {EXPERTS, 2 * INNER, HIDDEN};
    const int64_t up_turned[] = {EXPERTS, HIDDEN, 2 * INNER};
    const int64_t down[] = {EXPERTS, HIDDEN, inner};
    const int64_t down_turned[] = {EXPERTS, inner, HIDDEN};
    const int module = add_module(f, "mlp.experts", TP_MODULE_OTHER, 0);
    add_shaped(f, module, "gate_up_proj", 3, turned ? up_turned : up, -1);
    add_shaped(f, module, "gate_up_proj_bias", 2, (int64_t[]){EXPERTS, 2 * INNER}, -1);
    add_shaped(f, module, "down_proj", 3, turned ? down_turned : down, -1);
}

static void
test_gate_and_up_follow_each_other_in_either_order_of_dimensions(void)
{
    for (int turned = 0; turned < 2; turned++) {
        fixture f = experts_new(NULL);
        add_tensors(&f, turned, INNER);
        if (make_plan(&f)) {
            CHECK_TEXT_EQ(runs_of(&f, "mlp.experts.gate_up_proj", 1), "3+3 9+3");
            CHECK_TEXT_EQ(runs_of(&f, "mlp.experts.gate_up_proj_bias", 1), "3+3 9+3");
            CHECK_TEXT_EQ(local_of(&f, "mlp.experts.down_proj", 1),
                          turned ? "row [3, 3, 8]" : "row [3, 8, 3]");
            CHECK_INT_EQ(layer_of(&f, "mlp.experts")->kind, TP_EXPERTS);
            CHECK_INT_EQ(entry_of(&f, "mlp.experts.down_proj")->source,
                         TP_FROM_HEURISTIC);
        }
        fixture_free(&f);
    }
}

static void
test_gate_and_up_take_turns_in_types_that_are_known_for_it(void)
{
    fixture f = experts_new("gpt_oss");
    add_tensors(&f, true, INNER);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "mlp.experts.gate_up_proj", 1), "6+6");
        CHECK_TEXT_EQ(runs_of(&f, "mlp.experts.down_proj", 1), "3+3");
    }
    fixture_free(&f);
}

static void
test_experts_that_do_not_fit_or_have_a_rule_stay_replicated(void)
{
    fixture f = experts_new(NULL);
    add_tensors(&f, false, INNER - 1);
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
    fixture_free(&f);

    f = experts_new(NULL);
    add_fact(&f, "hidden_size", HIDDEN + 1);
    add_tensors(&f, false, INNER);
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
    fixture_free(&f);

    f = experts_new(NULL);
    add_tensors(&f, false, INNER);
    add_style(&f, "mlp.experts", "ep_router");
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
    fixture_free(&f);
}

/* jetmoe: a module for each layer of all experts, in attention as well. */
static void
test_modules_of_one_layer_each_give_and_take_a_part(void)
{
    fixture f = experts_new("jetmoe");
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    int at = add_module(&f, "mlp.input_linear", TP_MODULE_OTHER, 0);
    add_shaped(&f, at, "weight", 3, (int64_t[]){EXPERTS, 2 * INNER, HIDDEN}, -1);
    at = add_module(&f, "mlp.output_linear", TP_MODULE_OTHER, 0);
    add_shaped(&f, at, "weight", 3, (int64_t[]){EXPERTS, HIDDEN, INNER}, -1);
    add_module(&f, "attn", TP_MODULE_OTHER, 2, "num_heads", 2, "head_dim", 4);
    add_module(&f, "attn.experts", TP_MODULE_OTHER, 0);
    at = add_module(&f, "attn.experts.input_linear", TP_MODULE_OTHER, 0);
    add_shaped(&f, at, "weight", 3, (int64_t[]){EXPERTS, 2 * INNER, HIDDEN}, -1);
    at = add_module(&f, "attn.experts.output_linear", TP_MODULE_OTHER, 0);
    add_shaped(&f, at, "weight", 3, (int64_t[]){EXPERTS, HIDDEN, INNER}, -1);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "mlp.input_linear.weight", 1), "3+3 9+3");
        CHECK_INT_EQ(layer_of(&f, "mlp.input_linear")->kind, TP_EXPERTS_COLUMN);
        CHECK_INT_EQ(layer_of(&f, "mlp.output_linear")->kind, TP_EXPERTS_ROW);
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 2);
    }
    fixture_free(&f);
}

static void
test_a_layer_of_experts_that_are_summed_as_a_whole_is_none_itself(void)
{
    fixture f = experts_new(NULL);
    add_module(&f, "experts", TP_MODULE_OTHER, 0);
    const int at = add_module(&f, "experts.up", TP_MODULE_OTHER, 0);
    add_shaped(&f, at, "weight", 3, (int64_t[]){EXPERTS, INNER, HIDDEN}, -1);
    add_style(&f, "experts", "moe_tp_experts");
    add_style(&f, "experts.up", "colwise");
    if (make_plan(&f))
        CHECK(layer_of(&f, "experts.up") == NULL);
    fixture_free(&f);
}

/* dbrx: [experts * features, hidden], viewed by the module around. */
static void
test_stacked_experts_are_sharded_inside_each_and_viewed_narrower(void)
{
    for (int whole = 0; whole < 2; whole++) {
        const int64_t shape[] = {EXPERTS * INNER, HIDDEN};
        fixture f = experts_new(NULL);
        f.options.replicated = (const char *const[]){"ffn.experts"};
        f.options.replicated_count = whole;
        add_module(&f, "ffn.experts", TP_MODULE_OTHER, 2, "ffn_hidden_size", INNER,
                   "hidden_size", INNER);
        const int at = add_module(&f, "ffn.experts.mlp", TP_MODULE_OTHER, 1,
                                  "moe_num_experts", EXPERTS);
        add_shaped(&f, at, "w1", 2, shape, -1);
        add_shaped(&f, at, "v1", 2, shape, -1);
        add_shaped(&f, at, "w2", 2, shape, -1);
        if (make_plan(&f)) {
            const int64_t *width = integer_of(&f, "ffn.experts", "ffn_hidden_size");
            CHECK_TEXT_EQ(local_of(&f, "ffn.experts.mlp.w2", 1),
                          whole ? "replicated [18, 8]" : "column [9, 8]");
            CHECK_INT_EQ(entry_of(&f, "ffn.experts.mlp.w1")->outer,
                         whole ? 1 : EXPERTS);
            CHECK((width == NULL) == whole && (whole || width[1] == 3));
            CHECK(integer_of(&f, "ffn.experts", "hidden_size") == NULL);
            CHECK(whole ? tp_plan_layer_count(f.plan) == 0
                        : layer_of(&f, "ffn.experts")->kind == TP_EXPERTS);
        }
        fixture_free(&f);
    }
}

int
main(void)
{
    RUN(test_gate_and_up_follow_each_other_in_either_order_of_dimensions);
    RUN(test_gate_and_up_take_turns_in_types_that_are_known_for_it);
    RUN(test_experts_that_do_not_fit_or_have_a_rule_stay_replicated);
    RUN(test_modules_of_one_layer_each_give_and_take_a_part);
    RUN(test_a_layer_of_experts_that_are_summed_as_a_whole_is_none_itself);
    RUN(test_stacked_experts_are_sharded_inside_each_and_viewed_narrower);
    return check_result();
}
