/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"
#include "rules/families.h"

static fixture
family_new(int ranks, const char *model_type)
{
    fixture f = fixture_new(ranks);
    f.options.families = f.options.heuristics = true;
    f.facts.model_type = model_type;
    f.facts.prefix = "";
    return f;
}

/* BERT's names: the heads are known of a module beside the one that holds the output.
 */
static void
add_bert_layer(fixture *f)
{
    add_module(f, "layer.0.attention.self", TP_MODULE_OTHER, 3, "num_attention_heads",
               4, "attention_head_size", 4, "all_head_size", 16);
    add_vector(f, add_linear(f, "layer.0.attention.self.query", 16, 16), "bias", 16);
    add_linear(f, "layer.0.attention.self.key", 16, 16);
    add_linear(f, "layer.0.attention.self.value", 16, 16);
    add_module(f, "layer.0.attention.output", TP_MODULE_OTHER, 0);
    add_linear(f, "layer.0.attention.output.dense", 16, 16);
    add_linear(f, "layer.0.intermediate.dense", 24, 16);
    add_linear(f, "layer.0.output.dense", 16, 24);
}

static void
test_blocks_span_modules(void)
{
    fixture f = family_new(2, "bert");
    add_bert_layer(&f);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "layer.0.attention.self.query.weight", 0),
                      "column [8, 16]");
        CHECK_TEXT_EQ(local_of(&f, "layer.0.attention.self.query.bias", 1),
                      "column [8]");
        CHECK_TEXT_EQ(local_of(&f, "layer.0.attention.self.value.weight", 1),
                      "column [8, 16]");
        CHECK_TEXT_EQ(local_of(&f, "layer.0.attention.output.dense.weight", 0),
                      "row [16, 8]");
        CHECK_TEXT_EQ(local_of(&f, "layer.0.intermediate.dense.weight", 0),
                      "column [12, 16]");
        CHECK_TEXT_EQ(local_of(&f, "layer.0.output.dense.weight", 0), "row [16, 12]");
        CHECK_INT_EQ(entry_of(&f, "layer.0.output.dense.weight")->source,
                     TP_FROM_FAMILY);
        const int64_t *width =
            integer_of(&f, "layer.0.attention.self", "all_head_size");
        CHECK(width != NULL && width[0] == 8 && width[1] == 8);
    }
    fixture_free(&f);
}

static void
test_an_unknown_model_type_is_a_guess(void)
{
    fixture f = family_new(2, "nobody");
    add_bert_layer(&f);
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "layer.0.output.dense.weight")->source,
                     TP_FROM_HEURISTIC);
    fixture_free(&f);

    f = family_new(2, "nobody");
    f.options.heuristics = false;
    add_bert_layer(&f);
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "layer.0.output.dense.weight")->kind, TP_REPLICATED);
    fixture_free(&f);
}

/* GPT-2's names: a transposed fused q|k|v and its width. */
static void
add_gpt2_layer(fixture *f)
{
    add_module(f, "h.0.attn", TP_MODULE_OTHER, 4, "num_heads", 4, "head_dim", 4,
               "embed_dim", 16, "split_size", 16);
    add_vector(f, add_matrix(f, "h.0.attn.c_attn", TP_MODULE_CONV1D, 16, 48), "bias",
               48);
    add_matrix(f, "h.0.attn.c_proj", TP_MODULE_CONV1D, 16, 16);
    add_module(f, "h.0.mlp", TP_MODULE_OTHER, 0);
    add_matrix(f, "h.0.mlp.c_fc", TP_MODULE_CONV1D, 16, 64);
    add_matrix(f, "h.0.mlp.c_proj", TP_MODULE_CONV1D, 64, 16);
}

static void
test_a_transposed_fused_layer_is_sharded_by_heads(void)
{
    fixture f = family_new(2, "gpt2");
    add_gpt2_layer(&f);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "h.0.attn.c_attn.weight", 1), "8+8 24+8 40+8");
        CHECK_TEXT_EQ(runs_of(&f, "h.0.attn.c_attn.bias", 1), "8+8 24+8 40+8");
        CHECK_TEXT_EQ(local_of(&f, "h.0.attn.c_attn.weight", 0), "column [16, 24]");
        CHECK_TEXT_EQ(local_of(&f, "h.0.attn.c_proj.weight", 0), "row [8, 16]");
        CHECK_TEXT_EQ(local_of(&f, "h.0.mlp.c_proj.weight", 0), "row [32, 16]");
        const int64_t *split = integer_of(&f, "h.0.attn", "split_size");
        CHECK(split != NULL && split[0] == 8);
        CHECK(layer_of(&f, "h.0.attn") == NULL); /* nothing per head comes in */
    }
    fixture_free(&f);
}

static void
test_a_replicated_block_is_left_with_all_its_layers(void)
{
    fixture f = family_new(2, "gpt2");
    add_gpt2_layer(&f);
    f.options.replicated = (const char *const[]){"h.*.attn.c_proj"};
    f.options.replicated_count = 1;
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "h.0.attn.c_attn.weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "h.0.mlp.c_fc.weight")->kind, TP_COLUMN);
        CHECK(integer_of(&f, "h.0.attn", "num_heads") == NULL);
    }
    fixture_free(&f);
}

static void
test_an_individually_sharded_block_has_no_heads_of_a_rank(void)
{
    fixture f = family_new(2, "gpt2");
    add_gpt2_layer(&f);
    f.options.individual = (const char *const[]){"h.*.attn"};
    f.options.individual_count = 1;
    if (make_plan(&f)) {
        CHECK(layer_of(&f, "h.0.attn.c_attn")->gather_output);
        CHECK(layer_of(&f, "h.0.attn.c_proj")->split_input);
        CHECK(!layer_of(&f, "h.0.mlp.c_fc")->gather_output);
        CHECK(integer_of(&f, "h.0.attn", "num_heads") == NULL);
    }
    fixture_free(&f);
}

static void
test_a_block_with_a_rule_is_not_for_the_table(void)
{
    fixture f = family_new(2, "gpt2");
    add_gpt2_layer(&f);
    add_style(&f, "h.*.mlp.c_fc", "colwise_gather_output");
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "h.0.mlp.c_proj.weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "h.0.attn.c_proj.weight")->kind, TP_ROW);
    }
    fixture_free(&f);

    f = family_new(2, "gpt2");
    add_gpt2_layer(&f);
    add_rule(&f, "mlp", ".*c_fc.*", TP_PARTITION_SKIP);
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "h.0.attn.c_proj.weight")->kind, TP_REPLICATED);
    fixture_free(&f);
}

static void
test_sizes_that_do_not_pair_stay_replicated_with_a_message(void)
{
    fixture f = family_new(2, NULL);
    add_module(&f, "layers.0", TP_MODULE_OTHER, 0);
    add_linear(&f, "layers.0.fc1", 24, 16);
    add_linear(&f, "layers.0.fc2", 16, 32);
    add_module(&f, "layers.1", TP_MODULE_OTHER, 0);
    add_linear(&f, "layers.1.fc1", 24, 16);
    add_linear(&f, "layers.1.fc2", 16, 32);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "layers.0.fc1.weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 1);
        CHECK_TEXT_HAS(tp_plan_message(f.plan, 0)->text, "layers.*.fc2");
    }
    fixture_free(&f);
}

static void
test_attention_of_unknown_heads_stays_replicated(void)
{
    fixture f = family_new(2, NULL);
    add_module(&f, "attn", TP_MODULE_OTHER, 0);
    add_linear(&f, "attn.qkv_proj", 48, 16);
    add_linear(&f, "attn.out_proj", 16, 16);
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "attn.qkv_proj.weight")->kind, TP_REPLICATED);
    fixture_free(&f);
}

static void
test_more_ranks_than_heads_leave_attention_replicated(void)
{
    fixture f = family_new(8, "gpt2");
    add_gpt2_layer(&f);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "h.0.attn.c_attn.weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "h.0.mlp.c_fc.weight")->kind, TP_COLUMN);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 1);
    }
    fixture_free(&f);
}

static void
test_one_layer_of_twice_the_features_is_a_gate_and_what_it_gates(void)
{
    fixture f = family_new(2, NULL);
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "mlp.gate_up_proj", 48, 16);
    add_linear(&f, "mlp.down_proj", 16, 24);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "mlp.gate_up_proj.weight", 0), "0+12 24+12");
        CHECK_TEXT_EQ(runs_of(&f, "mlp.down_proj.weight", 1), "12+12");
    }
    fixture_free(&f);
}

/* codegen: q, v and k of a quarter of the heads, four times. */
static void
test_groups_of_heads_are_sharded_one_by_one(void)
{
    fixture f = family_new(2, "codegen");
    add_module(&f, "attn", TP_MODULE_OTHER, 3, "num_attention_heads", 8, "head_dim", 2,
               "embed_dim", 16);
    add_linear(&f, "attn.qkv_proj", 48, 16);
    add_linear(&f, "attn.out_proj", 16, 16);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.qkv_proj.weight", 0),
                      "0+2 4+2 8+2 12+2 16+2 20+2 24+2 28+2 32+2 36+2 40+2 44+2");
        CHECK_TEXT_EQ(runs_of(&f, "attn.out_proj.weight", 0), "0+2 4+2 8+2 12+2");
        const int64_t *heads = integer_of(&f, "attn", "num_attention_heads");
        CHECK(heads != NULL && heads[0] == 4 && heads[1] == 4);
    }
    fixture_free(&f);
}

static void
test_what_is_given_per_head_is_sharded_to_the_heads_of_a_rank(void)
{
    fixture f = family_new(2, "bloom");
    add_module(&f, "attn", TP_MODULE_OTHER, 2, "num_heads", 3, "head_dim", 4);
    add_linear(&f, "attn.query_key_value", 36, 12);
    add_linear(&f, "attn.dense", 12, 12);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.query_key_value.weight", 1), "24+12");
        const tp_layer *layer = layer_of(&f, "attn");
        CHECK(layer != NULL && layer->kind == TP_HEADS);
        CHECK_INT_EQ(layer->heads->size, 3);
        CHECK_INT_EQ(layer->heads->shards[0].runs[0].length, 2);
        CHECK_INT_EQ(layer->heads->shards[1].runs[0].start, 2);
    }
    fixture_free(&f);
}

static void
test_embedding_and_head_are_sharded_beside_blocks(void)
{
    fixture f = family_new(2, NULL);
    const int embedding = add_matrix(&f, "wte", TP_MODULE_EMBEDDING, 33, 16);
    f.facts.input_embedding = tp_model_parameter(f.model, embedding)->module;
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "mlp.fc1", 24, 16);
    add_linear(&f, "mlp.fc2", 16, 24);
    const int head = add_module(&f, "lm_head", TP_MODULE_LINEAR, 0);
    add_shaped(&f, head, "weight", 2, (int64_t[]){33, 16}, embedding);
    f.facts.output_head = head;
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "wte.weight")->kind, TP_VOCABULARY);
        CHECK(layer_of(&f, "lm_head")->gather_output);
    }
    fixture_free(&f);
}

static void
test_a_tensor_of_two_blocks_is_sharded_once(void)
{
    fixture f = family_new(2, NULL);
    add_module(&f, "a", TP_MODULE_OTHER, 0);
    const int up = add_linear(&f, "a.fc1", 24, 16);
    const int down = add_linear(&f, "a.fc2", 16, 24);
    add_module(&f, "b", TP_MODULE_OTHER, 0);
    const int other = add_module(&f, "b.fc1", TP_MODULE_LINEAR, 0);
    add_shaped(&f, other, "weight", 2, (int64_t[]){24, 16}, up);
    const int last = add_module(&f, "b.fc2", TP_MODULE_LINEAR, 0);
    add_shaped(&f, last, "weight", 2, (int64_t[]){16, 24}, down);
    if (make_plan(&f)) {
        CHECK_INT_EQ(layer_of(&f, "b.fc1")->kind, TP_COLUMN);
        CHECK_INT_EQ(layer_of(&f, "b.fc2")->kind, TP_ROW);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_every_row_names_its_layers(void)
{
    for (int i = 0; i < tp_family_block_count; i++) {
        const tp_family_block *row = &tp_family_blocks[i];
        CHECK(row->output != NULL && row->inputs[0] != NULL);
        for (int j = 0; j < i; j++) {
            const tp_family_block *other = &tp_family_blocks[j];
            const bool same = strcmp(row->output, other->output) == 0 &&
                              strcmp(row->inputs[0], other->inputs[0]) == 0 &&
                              (row->inputs[1] == NULL) == (other->inputs[1] == NULL);
            CHECK(!same || other->model_type != NULL);
        }
    }
}

int
main(void)
{
    RUN(test_blocks_span_modules);
    RUN(test_an_unknown_model_type_is_a_guess);
    RUN(test_a_transposed_fused_layer_is_sharded_by_heads);
    RUN(test_a_replicated_block_is_left_with_all_its_layers);
    RUN(test_an_individually_sharded_block_has_no_heads_of_a_rank);
    RUN(test_a_block_with_a_rule_is_not_for_the_table);
    RUN(test_sizes_that_do_not_pair_stay_replicated_with_a_message);
    RUN(test_attention_of_unknown_heads_stays_replicated);
    RUN(test_more_ranks_than_heads_leave_attention_replicated);
    RUN(test_one_layer_of_twice_the_features_is_a_gate_and_what_it_gates);
    RUN(test_groups_of_heads_are_sharded_one_by_one);
    RUN(test_what_is_given_per_head_is_sharded_to_the_heads_of_a_rank);
    RUN(test_embedding_and_head_are_sharded_beside_blocks);
    RUN(test_a_tensor_of_two_blocks_is_sharded_once);
    RUN(test_every_row_names_its_layers);
    return check_result();
}
