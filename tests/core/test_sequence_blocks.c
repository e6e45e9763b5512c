/* SPDX-License-Identifier: Apache-2.0 */
/* What is in the blocks of a layer between which tokens are sharded. */
#include "plan_fixture.h"

/* A list with one layer, `list.0`, which has nothing yet. */
static fixture
with_one_layer(void)
{
    fixture f = fixture_new(2);
    f.options.sequence = true;
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "list", TP_MODULE_OTHER, 0);
    add_module(&f, "list.0", TP_MODULE_OTHER, 0);
    add_rule(&f, "a", ".*up\\.weight", TP_PARTITION_COLUMN);
    add_rule(&f, "b", ".*down\\.weight", TP_PARTITION_ROW);
    return f;
}

static int
add_norm(fixture *f, const char *name)
{
    const int norm = add_module(f, name, TP_MODULE_OTHER, 0);
    return add_shaped(f, norm, "weight", 1, (int64_t[]){16}, -1);
}

/* As in BERT, with one column layer: the block is given all tokens as a whole, and what
 * is behind its row layer has a rank's own. */
static fixture
with_output_block(void)
{
    fixture f = with_one_layer();
    const int block = add_module(&f, "list.0.attention", TP_MODULE_OTHER, 0);
    add_shaped(&f, block, "table", 2, (int64_t[]){16, 16}, -1);
    add_shaped(&f, block, "scale", 1, (int64_t[]){16}, -1);
    add_shaped(&f, block, "down_scale", 1, (int64_t[]){16}, -1);
    add_module(&f, "list.0.attention.self", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.attention.self.up", 16, 16);
    add_norm(&f, "list.0.attention.self.norm");
    add_module(&f, "list.0.attention.output", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.attention.output.down", 16, 16);
    add_norm(&f, "list.0.attention.output.norm");
    return f;
}

static void
test_what_is_behind_the_row_layer_of_a_block_has_a_part_of_its_tokens(void)
{
    fixture f = with_output_block();
    add_linear(&f, "list.0.attention.output.extra", 16, 16);
    if (make_plan(&f)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        check_modules(&f, &stack->gather_input, NAMES("list.0.attention"));
        CHECK_INT_EQ(stack->gather_scatter.count, 0);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.output.norm.weight")->kind,
                     TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.output.extra.weight")->kind,
                     TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.self.norm.weight")->kind,
                     TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.table")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.scale")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.down_scale")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
test_a_row_layer_behind_another_that_splits_its_input_is_given_all_tokens(void)
{
    fixture f = with_output_block();
    add_linear(&f, "list.0.attention.output.whole", 16, 16);
    add_spec(&f, "c", ".*whole\\.weight",
             (tp_spec){.partition = TP_PARTITION_ROW, .dim = -1, .split_input = true});
    if (make_plan(&f)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        check_modules(&f, &stack->gather_input, NAMES("list.0.attention"));
        check_modules(&f, &stack->reduce_scatter_output,
                      NAMES("list.0.attention.output.down"));
    }
    fixture_free(&f);
}

static void
test_only_the_bias_that_is_called_as_a_row_layer_beside_it_is_its_bias(void)
{
    fixture f = with_one_layer();
    const int block = add_module(&f, "list.0.attention", TP_MODULE_OTHER, 0);
    add_shaped(&f, block, "down_bias", 1, (int64_t[]){16}, -1);
    add_shaped(&f, block, "dawn_bias", 1, (int64_t[]){16}, -1); /* as long */
    add_shaped(&f, block, "inner_bias", 1, (int64_t[]){16}, -1);
    add_linear(&f, "list.0.attention.up", 16, 16);
    add_module(&f, "list.0.attention.deep", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.attention.deep.inner", 16, 16);
    add_linear(&f, "list.0.attention.down", 16, 16);
    add_rule(&f, "c", ".*inner\\.weight", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.down_bias")->kind,
                     TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.dawn_bias")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.inner_bias")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
test_a_full_output_in_a_block_with_a_row_layer_gathers_at_the_block(void)
{
    fixture f = with_one_layer();
    add_module(&f, "list.0.mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.mlp.gathered", 16, 16);
    add_linear(&f, "list.0.mlp.down", 16, 16);
    add_spec(
        &f, "c", ".*gathered\\.weight",
        (tp_spec){.partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true});
    if (make_plan(&f)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        check_modules(&f, &stack->gather_input, NAMES("list.0.mlp"));
        check_modules(&f, &stack->reduce_scatter_output, NAMES("list.0.mlp.down"));
        CHECK_INT_EQ(stack->gather_scatter.count, 0);
    }
    fixture_free(&f);
}

static void
test_an_embedding_sharded_along_its_columns_inside_of_a_layer_is_refused(void)
{
    fixture f = with_one_layer();
    add_matrix(&f, "list.0.table", TP_MODULE_EMBEDDING, 8, 16);
    add_linear(&f, "list.0.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    add_style(&f, "list.*.table", "embedding_colwise");
    CHECK_REFUSED(&f, "'list.0.table' is no layer around which tokens can be sharded");
}

static void
test_a_table_of_heads_is_no_layer_that_is_given_tokens(void)
{
    fixture f = fixture_new(2);
    f.options.families = f.options.heuristics = f.options.sequence = true;
    f.facts.model_type = "t5";
    f.facts.prefix = "";
    add_module(&f, "layer", TP_MODULE_OTHER, 0);
    add_module(&f, "layer.0", TP_MODULE_OTHER, 0);
    add_module(&f, "layer.0.SelfAttention", TP_MODULE_OTHER, 3, "n_heads", 4,
               "key_value_proj_dim", 4, "inner_dim", 16);
    add_linear(&f, "layer.0.SelfAttention.q", 16, 16);
    add_linear(&f, "layer.0.SelfAttention.k", 16, 16);
    add_linear(&f, "layer.0.SelfAttention.v", 16, 16);
    add_linear(&f, "layer.0.SelfAttention.o", 16, 16);
    add_matrix(&f, "layer.0.SelfAttention.relative_attention_bias", TP_MODULE_EMBEDDING,
               8, 4);
    if (make_plan(&f)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        CHECK_INT_EQ(
            layer_of(&f, "layer.0.SelfAttention.relative_attention_bias")->kind,
            TP_COLUMN);
        check_modules(&f, &stack->layers, NAMES("layer.0"));
        check_modules(&f, &stack->gather_input, NAMES("layer.0.SelfAttention"));
        CHECK_INT_EQ(stack->gather_scatter.count, 0);
    }
    fixture_free(&f);
}

static void
test_a_vector_of_the_layer_itself_is_used_on_a_part_of_the_tokens(void)
{
    fixture f = with_one_layer();
    add_shaped(&f, 2, "scale", 1, (int64_t[]){16}, -1);
    add_shaped(&f, 2, "mix", 2, (int64_t[]){2, 16}, -1);
    add_linear(&f, "list.0.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "list.0.scale")->kind, TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "list.0.mix")->kind, TP_REPLICATED_SUM);
        CHECK_INT_EQ(tp_plan_stack(f.plan, 0)->gather_scatter.count, 0);
    }
    fixture_free(&f);
}

static void
test_norms_of_one_tensor_that_are_given_the_same_tokens_are_summed(void)
{
    fixture f = with_one_layer();
    const int weight = add_norm(&f, "list.0.norm");
    const int other = add_module(&f, "list.0.other", TP_MODULE_OTHER, 0);
    add_shaped(&f, other, "weight", 1, (int64_t[]){16}, weight);
    add_linear(&f, "list.0.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "list.0.norm.weight")->kind, TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "list.0.other.weight")->kind, TP_REPLICATED_SUM);
    }
    fixture_free(&f);
}

static void
test_a_model_that_is_a_list_of_layers_runs_them_itself(void)
{
    fixture f = fixture_new(2);
    f.options.sequence = true;
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "0", TP_MODULE_OTHER, 0);
    add_linear(&f, "0.up", 16, 16);
    add_linear(&f, "0.down", 16, 16);
    add_rule(&f, "a", ".*up\\.weight", TP_PARTITION_COLUMN);
    add_rule(&f, "b", ".*down\\.weight", TP_PARTITION_ROW);
    if (make_plan(&f) && CHECK_INT_EQ(tp_plan_stack_count(f.plan), 1)) {
        CHECK_INT_EQ(tp_plan_stack(f.plan, 0)->owner, 0);
        check_modules(&f, &tp_plan_stack(f.plan, 0)->layers, NAMES("0"));
    }
    fixture_free(&f);
}

static void
test_experts_of_every_form_are_given_all_tokens(void)
{
    /* jetmoe: a module for each layer of all experts. */
    fixture f = fixture_new(2);
    f.options.families = f.options.heuristics = f.options.sequence = true;
    f.facts.model_type = "jetmoe";
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "list", TP_MODULE_OTHER, 0);
    add_module(&f, "list.0", TP_MODULE_OTHER, 0);
    add_module(&f, "list.0.mlp", TP_MODULE_OTHER, 0);
    int at = add_module(&f, "list.0.mlp.input_linear", TP_MODULE_OTHER, 0);
    add_shaped(&f, at, "weight", 3, (int64_t[]){3, 12, 8}, -1);
    at = add_module(&f, "list.0.mlp.output_linear", TP_MODULE_OTHER, 0);
    add_shaped(&f, at, "weight", 3, (int64_t[]){3, 8, 6}, -1);
    if (make_plan(&f))
        check_modules(&f, &tp_plan_stack(f.plan, 0)->gather_scatter,
                      NAMES("list.0.mlp"));
    fixture_free(&f);

    /* Whole experts. */
    for (int blocks = 0; blocks < 2; blocks++) {
        f = with_one_layer();
        f.options.expert_partition = TP_EXPERTS_WHOLE;
        at = add_module(&f, "list.0.experts",
                        blocks ? TP_MODULE_EXPERT_BLOCKS : TP_MODULE_EXPERTS, 1,
                        "num_experts", 4);
        add_shaped(&f, at, "gate_up_proj", 3, (int64_t[]){4, 32, 8}, -1);
        add_shaped(&f, at, "down_proj", 3, (int64_t[]){4, 8, 16}, -1);
        add_style(&f, "list.*.experts.gate_up_proj", "packed_colwise");
        add_style(&f, "list.*.experts.down_proj", "rowwise");
        add_style(&f, "list.*.experts", "moe_tp_experts");
        if (make_plan(&f)) {
            CHECK_INT_EQ(layer_of(&f, "list.0.experts")->kind,
                         blocks ? TP_WHOLE_EXPERT_BLOCKS : TP_WHOLE_EXPERTS);
            check_modules(&f, &tp_plan_stack(f.plan, 0)->gather_scatter,
                          NAMES("list.0.experts"));
        }
        fixture_free(&f);
    }
}

static void
test_a_pattern_of_blocks_names_those_that_it_matches_alone(void)
{
    fixture f = with_one_layer();
    add_module(&f, "list.0.mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.mlp.up", 16, 16);
    add_linear(&f, "list.0.mlp.down", 16, 16);
    add_module(&f, "list.0.other", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.other.up", 16, 16);
    add_linear(&f, "list.0.other.down", 16, 16);
    f.options.all_tokens = (const char *const[]){"list.*.other"};
    f.options.all_tokens_count = 1;
    if (make_plan(&f)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        check_modules(&f, &stack->gather_scatter, NAMES("list.0.other"));
        check_modules(&f, &stack->gather_input, NAMES("list.0.mlp"));
    }
    fixture_free(&f);
}

static void
add_norm_of_class(fixture *f, const char *name, const char *class_name)
{
    add_shaped(f, add_class(f, name, class_name), "weight", 1, (int64_t[]){16}, -1);
}

/* What an output head may be given this rank's tokens through. */
static void
test_norms_of_the_owner_behind_the_layers_are_named(void)
{
    fixture f = with_one_layer();
    add_linear(&f, "list.0.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    add_norm_of_class(&f, "list.0.norm", "RMSNorm");
    add_norm_of_class(&f, "norm", "LlamaRMSNorm");
    add_norm_of_class(&f, "groups", "GroupNorm");
    add_norm_of_class(&f, "scale", "LayerScale");
    const int full = add_class(&f, "full", "FullNorm");
    add_shaped(&f, full, "weight", 2, (int64_t[]){16, 16}, -1);
    add_norm_of_class(&f, "pair", "PairNorm");
    add_norm_of_class(&f, "pair.first", "LayerNorm");
    add_class(&f, "last", "WeightlessNorm");
    if (make_plan(&f) && CHECK(tp_plan_stack_count(f.plan) == 1)) {
        const tp_modules *norms = &tp_plan_stack(f.plan, 0)->norms;
        check_modules(&f, norms, NAMES("norm", "last"));
        CHECK_INT_EQ(entry_of(&f, "norm.weight")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
test_a_norm_is_behind_the_last_list_before_it(void)
{
    fixture f = with_one_layer();
    add_linear(&f, "list.0.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    add_norm_of_class(&f, "between", "RMSNorm");
    add_module(&f, "more", TP_MODULE_OTHER, 0);
    add_module(&f, "more.0", TP_MODULE_OTHER, 0);
    add_linear(&f, "more.0.up", 16, 16);
    add_linear(&f, "more.0.down", 16, 16);
    add_norm_of_class(&f, "last", "RMSNorm");
    if (make_plan(&f) && CHECK(tp_plan_stack_count(f.plan) == 2)) {
        check_modules(&f, &tp_plan_stack(f.plan, 0)->norms, NAMES("between"));
        check_modules(&f, &tp_plan_stack(f.plan, 1)->norms, NAMES("last"));
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_a_norm_is_behind_the_last_list_before_it);
    RUN(test_norms_of_the_owner_behind_the_layers_are_named);
    RUN(test_what_is_behind_the_row_layer_of_a_block_has_a_part_of_its_tokens);
    RUN(test_a_row_layer_behind_another_that_splits_its_input_is_given_all_tokens);
    RUN(test_only_the_bias_that_is_called_as_a_row_layer_beside_it_is_its_bias);
    RUN(test_a_full_output_in_a_block_with_a_row_layer_gathers_at_the_block);
    RUN(test_an_embedding_sharded_along_its_columns_inside_of_a_layer_is_refused);
    RUN(test_a_table_of_heads_is_no_layer_that_is_given_tokens);
    RUN(test_a_vector_of_the_layer_itself_is_used_on_a_part_of_the_tokens);
    RUN(test_norms_of_one_tensor_that_are_given_the_same_tokens_are_summed);
    RUN(test_a_model_that_is_a_list_of_layers_runs_them_itself);
    RUN(test_experts_of_every_form_are_given_all_tokens);
    RUN(test_a_pattern_of_blocks_names_those_that_it_matches_alone);
    return check_result();
}
