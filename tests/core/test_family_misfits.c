/* SPDX-License-Identifier: Apache-2.0 */
/* Layers whose names are those of a block, or of experts, and whose sizes are not. */
#include "plan_fixture.h"

static fixture
family_new(int ranks, const char *model_type)
{
    fixture f = fixture_new(ranks);
    f.options.families = f.options.heuristics = true;
    f.facts.model_type = model_type;
    f.facts.prefix = "";
    return f;
}

static void
check_layers(fixture *f, int count)
{
    if (make_plan(f))
        CHECK_INT_EQ(tp_plan_layer_count(f->plan), count);
    fixture_free(f);
}

static void
test_experts_whose_tensors_do_not_fit_each_other_stay_replicated(void)
{
    static const struct {
        int64_t up[3], down[3], hidden;
        int layers;
    } cases[] = {
        {{3, 12, 8}, {3, 8, 6}, 0, 1},  /* a gate beside what it gates */
        {{3, 6, 8}, {3, 8, 6}, 8, 1},   /* no gate */
        {{3, 6, 8}, {3, 8, 6}, 0, 0},   /* nor is it known which features are which */
        {{4, 12, 8}, {3, 8, 6}, 0, 0},  /* another number of experts */
        {{3, 12, 8}, {3, 10, 6}, 0, 0}, /* other hidden states */
        {{3, 18, 8}, {3, 8, 6}, 0, 0},  /* three for each feature */
        {{3, 2, 8}, {3, 8, 1}, 0, 0},   /* fewer features than ranks */
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        fixture f = family_new(2, NULL);
        if (cases[i].hidden > 0)
            add_fact(&f, "hidden_size", cases[i].hidden);
        add_module(&f, "experts", TP_MODULE_OTHER, 0);
        add_shaped(&f, 0, "gate_up_proj", 3, cases[i].up, -1);
        add_shaped(&f, 0, "down_proj", 3, cases[i].down, -1);
        check_layers(&f, cases[i].layers);
    }
}

static void
test_experts_that_are_projections_of_attention_stay_replicated(void)
{
    fixture f = family_new(2, NULL);
    add_module(&f, "attn", TP_MODULE_OTHER, 2, "num_heads", 3, "head_dim", 2);
    add_shaped(&f, 0, "gate_up_proj", 3, (int64_t[]){3, 12, 8}, -1);
    add_shaped(&f, 0, "down_proj", 3, (int64_t[]){3, 8, 6}, -1);
    check_layers(&f, 0);
}

static void
test_stacked_experts_that_no_number_divides_stay_replicated(void)
{
    static const struct {
        const char *name, *around, *key;
        int64_t first[2], last[2];
        int layers;
    } cases[] = {
        {"ffn.mlp", "ffn", "moe_num_experts", {18, 8}, {18, 8}, 1},
        {"ffn.mlp", "ffn", "moe_num_experts", {19, 8}, {19, 8}, 0},
        {"ffn.mlp", "ffn", "moe_num_experts", {36, 8}, {18, 8}, 0},
        {"ffn.mlp", "ffn", "moe_num_experts", {18, 4}, {18, 8}, 0},
        {"ffn.mlp", "ffn", "others", {18, 8}, {18, 8}, 0},
        {"mlp", "ffn", "moe_num_experts", {18, 8}, {18, 8}, 0}, /* in no module */
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        fixture f = family_new(2, NULL);
        add_module(&f, cases[i].around, TP_MODULE_OTHER, 0);
        const int at =
            add_module(&f, cases[i].name, TP_MODULE_OTHER, 1, cases[i].key, 3);
        add_shaped(&f, at, "w1", 2, cases[i].first, -1);
        add_shaped(&f, at, "v1", 2, cases[i].last, -1);
        add_shaped(&f, at, "w2", 2, cases[i].last, -1);
        check_layers(&f, cases[i].layers);
    }
}

/* codegen: heads in groups, of which each rank has as many. */
static void
test_heads_that_groups_and_ranks_do_not_divide_stay_replicated(void)
{
    for (int heads = 8; heads <= 16; heads += 8) {
        fixture f = family_new(4, "codegen");
        add_module(&f, "attn", TP_MODULE_OTHER, 2, "num_attention_heads", heads,
                   "head_dim", 2);
        add_linear(&f, "attn.qkv_proj", 6 * heads, 2 * heads);
        add_linear(&f, "attn.out_proj", 2 * heads, 2 * heads);
        check_layers(&f, heads == 16 ? 2 : 0);
    }
}

static void
test_projections_in_no_module_have_no_heads(void)
{
    fixture f = family_new(2, NULL);
    add_linear(&f, "q_proj", 16, 16);
    add_linear(&f, "k_proj", 16, 16);
    add_linear(&f, "v_proj", 16, 16);
    add_linear(&f, "o_proj", 16, 16);
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_integer_count(f.plan), 0);
    fixture_free(&f);
}

static void
test_a_vector_or_table_of_another_size_than_the_heads_stays_replicated(void)
{
    for (int i = 0; i < 2; i++) {
        fixture f = fixture_new(2);
        f.options.defaults = i == 0;
        add_module(&f, "attn", TP_MODULE_OTHER, 2, "head_dim", 4, "num_heads", 4);
        add_linear(&f, "attn.q_proj", 16, 16);
        if (i == 0)
            add_shaped(&f, 0, "sinks", 2, (int64_t[]){4, 4}, -1);
        else
            add_shaped(&f, 0, "sinks", 1, (int64_t[]){4}, -1);
        add_rule(&f, "q", ".*q_proj", TP_PARTITION_COLUMN);
        if (make_plan(&f))
            CHECK_INT_EQ(entry_of(&f, "attn.sinks")->kind, TP_REPLICATED);
        fixture_free(&f);
    }
    fixture f = family_new(2, "t5");
    add_module(&f, "SelfAttention", TP_MODULE_OTHER, 3, "n_heads", 4,
               "key_value_proj_dim", 4, "inner_dim", 16);
    add_linear(&f, "SelfAttention.q", 16, 16);
    add_linear(&f, "SelfAttention.k", 16, 16);
    add_linear(&f, "SelfAttention.v", 16, 16);
    add_linear(&f, "SelfAttention.o", 16, 16);
    add_matrix(&f, "SelfAttention.relative_attention_bias", TP_MODULE_EMBEDDING, 8, 3);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "SelfAttention.relative_attention_bias.weight")->kind,
                     TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "SelfAttention.q.weight")->kind, TP_COLUMN);
    }
    fixture_free(&f);
}

/* What a norm over one head has beside a weight and a bias is not known. */
static void
test_other_parameters_of_a_norm_over_one_head_keep_their_gradient(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "attn", TP_MODULE_OTHER, 2, "head_dim", 4, "num_heads", 4);
    add_linear(&f, "attn.q_proj", 16, 16);
    const int norm = add_module(&f, "attn.q_norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, norm, "bias", 1, (int64_t[]){4}, -1);
    add_shaped(&f, norm, "scale", 1, (int64_t[]){4}, -1);
    add_rule(&f, "q", ".*q_proj", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "attn.q_norm.bias")->kind, TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "attn.q_norm.scale")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
test_an_embedding_without_columns_is_not_sharded_by_default(void)
{
    fixture f = fixture_new(2);
    const int weight = add_matrix(&f, "embed", TP_MODULE_EMBEDDING, 8, 0);
    f.facts.input_embedding = tp_model_parameter(f.model, weight)->module;
    f.options.embedding_dim = 0;
    add_linear(&f, "up", 16, 8);
    add_rule(&f, "a", "up", TP_PARTITION_COLUMN);
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "embed.weight")->kind, TP_REPLICATED);
    fixture_free(&f);
}

static void
test_an_expert_for_each_of_fewer_ranks_is_counted_in_the_singular(void)
{
    fixture f = fixture_new(2);
    f.options.expert_partition = TP_EXPERTS_WHOLE;
    add_module(&f, "experts", TP_MODULE_EXPERTS, 1, "num_experts", 1);
    add_shaped(&f, 0, "gate_up_proj", 3, (int64_t[]){1, 12, 8}, -1);
    add_shaped(&f, 0, "down_proj", 3, (int64_t[]){1, 8, 6}, -1);
    add_style(&f, "experts.gate_up_proj", "packed_colwise");
    add_style(&f, "experts.down_proj", "rowwise");
    add_style(&f, "experts", "moe_tp_experts");
    CHECK_REFUSED(&f, "'experts' has 1 expert for 2 ranks");
}

static void
test_pieces_listed_along_another_dimension_are_refused(void)
{
    const tp_spec spec = {.partition = TP_PARTITION_COLUMN,
                          .dim = -1,
                          .shape = {2, {0, -1}, 2, {12, 12}}};
    fixture f = fixture_new(2);
    add_matrix(&f, "w", TP_MODULE_CONV1D, 24, 12);
    add_spec(&f, "r", "w", spec);
    CHECK_REFUSED(&f, "shape lists its pieces along another dimension than 1");
}

int
main(void)
{
    RUN(test_experts_whose_tensors_do_not_fit_each_other_stay_replicated);
    RUN(test_experts_that_are_projections_of_attention_stay_replicated);
    RUN(test_stacked_experts_that_no_number_divides_stay_replicated);
    RUN(test_heads_that_groups_and_ranks_do_not_divide_stay_replicated);
    RUN(test_projections_in_no_module_have_no_heads);
    RUN(test_a_vector_or_table_of_another_size_than_the_heads_stays_replicated);
    RUN(test_other_parameters_of_a_norm_over_one_head_keep_their_gradient);
    RUN(test_an_embedding_without_columns_is_not_sharded_by_default);
    RUN(test_an_expert_for_each_of_fewer_ranks_is_counted_in_the_singular);
    RUN(test_pieces_listed_along_another_dimension_are_refused);
    return check_result();
}
