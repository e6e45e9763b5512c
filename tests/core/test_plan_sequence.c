/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_llama.h"

static void
test_tokens_come_together_in_the_block_of_a_row_layer(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    f.options.sequence = true;
    if (make_plan(&f) && CHECK(tp_plan_stack_count(f.plan) == 1)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        check_modules(&f, &stack->layers, NAMES("model.layers.0"));
        check_modules(&f, &stack->gather_input,
                      NAMES("model.layers.0.self_attn", "model.layers.0.mlp"));
        check_modules(
            &f, &stack->reduce_scatter_output,
            NAMES("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"));
        CHECK_INT_EQ(stack->gather_scatter.count, 0);
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.input_layernorm.weight")->kind,
                     TP_REPLICATED_SUM);
    }
    fixture_free(&f);
}

static void
test_without_the_option_there_are_no_stacks(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        CHECK_INT_EQ(tp_plan_stack_count(f.plan), 0);
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.input_layernorm.weight")->kind,
                     TP_REPLICATED);
    }
    fixture_free(&f);
}

/* A list with one layer, `list.0`, which has nothing yet. */
static fixture
with_one_layer(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "list", TP_MODULE_OTHER, 0);
    add_module(&f, "list.0", TP_MODULE_OTHER, 0);
    return f;
}

static void
shard_up_and_down(fixture *f)
{
    add_rule(f, "a", ".*up\\.weight", TP_PARTITION_COLUMN);
    add_rule(f, "b", ".*down\\.weight", TP_PARTITION_ROW);
}

/* A module of its own with a norm, behind the linear `leaf`. */
static void
add_behind(fixture *f, const char *name)
{
    char full[64];
    add_module(f, name, TP_MODULE_OTHER, 0);
    snprintf(full, sizeof(full), "%s.dense", name);
    add_vector(f, add_linear(f, full, 16, 16), "bias", 16);
    snprintf(full, sizeof(full), "%s.norm", name);
    const int norm = add_module(f, full, TP_MODULE_OTHER, 0);
    add_shaped(f, norm, "weight", 1, (int64_t[]){16}, -1);
}

/* As in BERT, where a residual is added to a shard of the tokens behind the row layer,
 * and in OPT, whose feed-forward layers are in the layer itself. */
static void
test_what_goes_on_behind_a_row_layer_has_a_part_of_the_tokens(void)
{
    fixture f = with_one_layer();
    add_module(&f, "list.0.attention", TP_MODULE_OTHER, 0);
    add_module(&f, "list.0.attention.self", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.attention.self.up", 16, 16);
    add_linear(&f, "list.0.attention.self.other_up", 16, 16);
    const int inner = add_module(&f, "list.0.attention.self.norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, inner, "weight", 1, (int64_t[]){4}, -1);
    add_behind(&f, "list.0.attention.output");
    add_linear(&f, "list.0.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    add_rule(&f, "a", ".*up\\.weight", TP_PARTITION_COLUMN);
    add_rule(&f, "b", ".*(dense|down)\\.weight", TP_PARTITION_ROW);
    f.options.sequence = true;
    if (make_plan(&f)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        CHECK_INT_EQ(stack->owner, 0);
        check_modules(&f, &stack->gather_input,
                      NAMES("list.0.attention.self", "list.0.up"));
        check_modules(&f, &stack->reduce_scatter_output,
                      NAMES("list.0.attention.output.dense", "list.0.down"));
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.output.norm.weight")->kind,
                     TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.output.dense.bias")->kind,
                     TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.self.norm.weight")->kind,
                     TP_REPLICATED);
    }
    fixture_free(&f);
}

/* Attention that stays replicated or gives full outputs, beside a router and an expert
 * that are shared by all. */
static void
test_a_block_with_a_full_matrix_is_given_all_tokens(void)
{
    fixture f = with_one_layer();
    add_module(&f, "list.0.mixer", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.mixer.in", 16, 16);
    add_module(&f, "list.0.apart", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.apart.gathered", 16, 16);
    add_module(&f, "list.0.experts", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.experts.router", 4, 16);
    add_module(&f, "list.0.experts.shared", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.experts.shared.up", 16, 16);
    add_linear(&f, "list.0.experts.shared.down", 16, 16);
    shard_up_and_down(&f);
    add_spec(
        &f, "c", ".*gathered\\.weight",
        (tp_spec){.partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true});
    f.options.sequence = true;
    if (make_plan(&f)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        check_modules(&f, &stack->gather_scatter,
                      NAMES("list.0.mixer", "list.0.apart", "list.0.experts"));
        CHECK_INT_EQ(stack->gather_input.count, 0);
        CHECK_INT_EQ(stack->reduce_scatter_output.count, 0);
        CHECK_INT_EQ(entry_of(&f, "list.0.experts.router.weight")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
add_split_row(fixture *f, const char *pattern)
{
    add_spec(f, pattern, pattern,
             (tp_spec){.partition = TP_PARTITION_ROW, .dim = -1, .split_input = true});
}

/* Individually sharded layers: latent attention with a row layer that makes the latent,
 * a state space mixer without another one, and one by itself. */
static void
test_a_row_layer_that_splits_its_input_sums_over_the_same_tokens(void)
{
    fixture f = with_one_layer();
    add_module(&f, "list.0.attention", TP_MODULE_OTHER, 0);
    add_module(&f, "list.0.attention.latent", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.attention.latent.whole", 16, 16);
    add_linear(&f, "list.0.attention.latent.up", 16, 16);
    add_linear(&f, "list.0.attention.down", 16, 16);
    add_module(&f, "list.0.mixer", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.mixer.up", 16, 16);
    add_linear(&f, "list.0.mixer.whole", 16, 16);
    add_linear(&f, "list.0.whole", 16, 16);
    shard_up_and_down(&f);
    add_split_row(&f, ".*whole\\.weight");
    f.options.sequence = true;
    if (make_plan(&f)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        check_modules(&f, &stack->gather_input, NAMES("list.0.attention"));
        check_modules(&f, &stack->reduce_scatter_output,
                      NAMES("list.0.attention.down"));
        check_modules(&f, &stack->gather_scatter,
                      NAMES("list.0.mixer", "list.0.whole"));
    }
    fixture_free(&f);
}

static void
test_layers_whose_only_sharded_blocks_are_experts_are_a_stack(void)
{
    fixture f = with_one_layer();
    add_linear(&f, "list.0.router", 4, 16);
    const int experts =
        add_module(&f, "list.0.experts", TP_MODULE_EXPERTS, 1, "num_experts", 4);
    add_shaped(&f, experts, "gate_up_proj", 3, (int64_t[]){4, 32, 8}, -1);
    add_shaped(&f, experts, "down_proj", 3, (int64_t[]){4, 8, 16}, -1);
    add_style(&f, "list.*.experts.gate_up_proj", "packed_colwise");
    add_style(&f, "list.*.experts.down_proj", "rowwise");
    add_style(&f, "list.*.experts", "moe_tp_experts");
    f.options.sequence = true;
    if (make_plan(&f) && CHECK_INT_EQ(tp_plan_stack_count(f.plan), 1))
        check_modules(&f, &tp_plan_stack(f.plan, 0)->gather_scatter,
                      NAMES("list.0.router", "list.0.experts"));
    fixture_free(&f);
}

/* As in GPT-NeoX-Japanese, whose attention gives its bias on for the layer to add. */
static void
test_a_bias_beside_its_row_layer_is_used_on_a_part_of_the_tokens(void)
{
    fixture f = with_one_layer();
    const int block = add_module(&f, "list.0.attention", TP_MODULE_OTHER, 0);
    add_shaped(&f, block, "down_bias", 1, (int64_t[]){16}, -1);
    add_shaped(&f, block, "up_bias", 1, (int64_t[]){16}, -1);
    add_linear(&f, "list.0.attention.up", 16, 16);
    add_linear(&f, "list.0.attention.down", 16, 16);
    shard_up_and_down(&f);
    f.options.sequence = true;
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.down_bias")->kind,
                     TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "list.0.attention.up_bias")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

/* Nor is one of attention modules, which are sharded themselves, as in BLT. */
static void
test_a_list_with_a_sharded_layer_in_it_is_no_stack(void)
{
    fixture f = with_one_layer();
    add_linear(&f, "list.0.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    add_module(&f, "mixed", TP_MODULE_OTHER, 0);
    add_module(&f, "mixed.0", TP_MODULE_OTHER, 0);
    add_linear(&f, "mixed.0.up", 16, 16);
    add_linear(&f, "mixed.0.down", 16, 16);
    add_linear(&f, "mixed.1", 16, 16);
    shard_up_and_down(&f);
    add_rule(&f, "c", "mixed\\.1\\.weight", TP_PARTITION_COLUMN);
    f.options.sequence = true;
    if (make_plan(&f) && CHECK_INT_EQ(tp_plan_stack_count(f.plan), 1))
        check_modules(&f, &tp_plan_stack(f.plan, 0)->layers, NAMES("list.0"));
    fixture_free(&f);
}

/* A block that adds its input to the output of its row layer, as RWKV's and XLNet's. */
static void
test_a_block_that_is_named_scatters_its_output(void)
{
    fixture f = with_one_layer();
    const int block = add_module(&f, "list.0.mlp", TP_MODULE_OTHER, 0);
    add_shaped(&f, block, "scale", 1, (int64_t[]){16}, -1);
    add_linear(&f, "list.0.mlp.up", 16, 16);
    add_linear(&f, "list.0.mlp.down", 16, 16);
    shard_up_and_down(&f);
    f.options.sequence = true;
    f.options.all_tokens = (const char *const[]){"list.*.mlp"};
    f.options.all_tokens_count = 1;
    if (make_plan(&f)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        check_modules(&f, &stack->gather_scatter, NAMES("list.0.mlp"));
        CHECK_INT_EQ(stack->gather_input.count, 0);
        CHECK_INT_EQ(stack->reduce_scatter_output.count, 0);
        CHECK_INT_EQ(entry_of(&f, "list.0.mlp.scale")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
test_a_block_that_is_named_has_to_end_in_a_row_layer(void)
{
    fixture f = with_one_layer();
    add_module(&f, "list.0.first", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.first.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    shard_up_and_down(&f);
    f.options.sequence = true;
    f.options.all_tokens = (const char *const[]){"list.*.first"};
    f.options.all_tokens_count = 1;
    CHECK_REFUSED(&f, "all_tokens[0]: 'list.*.first' is no block of a layer");
}

/* Hyper-connections: what is sharded in them takes the same tokens on all ranks, what
 * is not takes a part of them. */
static void
test_a_module_that_mixes_streams_has_a_part_of_the_tokens(void)
{
    fixture f = with_one_layer();
    const int streams = add_module(&f, "list.0.attn_hc", TP_MODULE_OTHER, 0);
    add_shaped(&f, streams, "fn", 2, (int64_t[]){8, 32}, -1);
    add_linear(&f, "list.0.attn_hc.whole", 16, 16);
    add_linear(&f, "list.0.attn_hc.gathered", 16, 16);
    add_linear(&f, "list.0.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    shard_up_and_down(&f);
    add_split_row(&f, ".*whole\\.weight");
    add_spec(
        &f, "c", ".*gathered\\.weight",
        (tp_spec){.partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true});
    f.options.sequence = true;
    if (make_plan(&f)) {
        check_modules(&f, &tp_plan_stack(f.plan, 0)->gather_scatter,
                      NAMES("list.0.attn_hc.whole", "list.0.attn_hc.gathered"));
        CHECK_INT_EQ(entry_of(&f, "list.0.attn_hc.fn")->kind, TP_REPLICATED_SUM);
        CHECK(!tp_plan_stack(f.plan, 0)->streams_first);
    }
    fixture_free(&f);
}

/* As in Zamba 2, where the mixer of such a layer is no child of the layer of the stack.
 */
static void
test_a_block_of_a_layer_inside_of_a_layer_is_given_all_tokens(void)
{
    fixture f = with_one_layer();
    const tp_module inner = {.name = "list.0.inner",
                             .class_name = "MambaDecoderLayer",
                             .kind = TP_MODULE_OTHER};
    int index = -1;
    CHECK_OK(tp_model_add_module(f.model, &inner, &index, &f.err), &f.err);
    add_module(&f, "list.0.inner.mixer", TP_MODULE_OTHER, 0);
    add_linear(&f, "list.0.inner.mixer.up", 16, 16);
    add_linear(&f, "list.0.inner.mixer.whole", 16, 16);
    add_spec(
        &f, "c", ".*up\\.weight",
        (tp_spec){.partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true});
    add_split_row(&f, ".*whole\\.weight");
    add_module(&f, "list.0.altup", TP_MODULE_OTHER, 0);
    f.options.sequence = true;
    if (make_plan(&f)) {
        const tp_stack *stack = tp_plan_stack(f.plan, 0);
        check_modules(&f, &stack->gather_scatter, NAMES("list.0.inner.mixer"));
        CHECK_INT_EQ(stack->gather_input.count, 0);
        CHECK(stack->streams_first);
    }
    fixture_free(&f);
}

static void
test_a_model_without_a_list_of_layers_is_refused(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "head", TP_MODULE_OTHER, 0);
    add_linear(&f, "head.0", 16, 16);
    add_linear(&f, "head.2", 16, 16);
    add_rule(&f, "a", "head.0\\.weight", TP_PARTITION_COLUMN);
    add_rule(&f, "b", "head.2\\.weight", TP_PARTITION_ROW);
    f.options.sequence = true;
    CHECK_REFUSED(&f, "sequence_parallel is true, but 'Any' has no list of layers");
}

static void
test_an_embedding_that_is_sharded_inside_of_a_layer_is_refused_by_name(void)
{
    fixture f = with_one_layer();
    add_matrix(&f, "list.0.table", TP_MODULE_EMBEDDING, 8, 16);
    add_linear(&f, "list.0.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    shard_up_and_down(&f);
    add_style(&f, "list.*.table", "embedding_rowwise");
    f.options.sequence = true;
    CHECK_REFUSED(&f, "'list.0.table' is no layer around which tokens can be sharded");
}

static void
test_a_norm_that_is_given_all_tokens_elsewhere_is_refused_by_name(void)
{
    fixture f = with_one_layer();
    const int norm = add_module(&f, "list.0.norm", TP_MODULE_OTHER, 0);
    const int weight = add_shaped(&f, norm, "weight", 1, (int64_t[]){16}, -1);
    add_linear(&f, "list.0.up", 16, 16);
    add_linear(&f, "list.0.down", 16, 16);
    const int final = add_module(&f, "final", TP_MODULE_OTHER, 0);
    add_shaped(&f, final, "weight", 1, (int64_t[]){16}, weight);
    shard_up_and_down(&f);
    f.options.sequence = true;
    CHECK_REFUSED(
        &f, "'final' has a weight in common with a module that is given other tokens");
}

static void
test_plans_that_differ_in_the_shards_of_tokens_alone_have_other_hashes(void)
{
    uint64_t hashes[2] = {0, 0};
    for (int sequence = 0; sequence < 2; sequence++) {
        fixture f = with_one_layer();
        add_linear(&f, "list.0.up", 16, 16);
        add_linear(&f, "list.0.down", 16, 16);
        shard_up_and_down(&f);
        f.options.sequence = sequence == 1;
        if (make_plan(&f))
            hashes[sequence] = tp_plan_hash(f.plan);
        fixture_free(&f);
    }
    CHECK(hashes[0] != hashes[1]);
}

int
main(void)
{
    RUN(test_a_norm_that_is_given_all_tokens_elsewhere_is_refused_by_name);
    RUN(test_plans_that_differ_in_the_shards_of_tokens_alone_have_other_hashes);
    RUN(test_tokens_come_together_in_the_block_of_a_row_layer);
    RUN(test_without_the_option_there_are_no_stacks);
    RUN(test_what_goes_on_behind_a_row_layer_has_a_part_of_the_tokens);
    RUN(test_a_block_with_a_full_matrix_is_given_all_tokens);
    RUN(test_a_row_layer_that_splits_its_input_sums_over_the_same_tokens);
    RUN(test_layers_whose_only_sharded_blocks_are_experts_are_a_stack);
    RUN(test_a_bias_beside_its_row_layer_is_used_on_a_part_of_the_tokens);
    RUN(test_a_list_with_a_sharded_layer_in_it_is_no_stack);
    RUN(test_a_block_that_is_named_scatters_its_output);
    RUN(test_a_block_that_is_named_has_to_end_in_a_row_layer);
    RUN(test_a_module_that_mixes_streams_has_a_part_of_the_tokens);
    RUN(test_a_block_of_a_layer_inside_of_a_layer_is_given_all_tokens);
    RUN(test_a_model_without_a_list_of_layers_is_refused);
    RUN(test_an_embedding_that_is_sharded_inside_of_a_layer_is_refused_by_name);
    return check_result();
}
