/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"
#include "rules/families.h"

/* A layer with LoRA of rank 3 on it. */
static void
add_adapted(fixture *f, const char *name, tp_module_kind kind, int out, int in)
{
    const bool linear = kind == TP_MODULE_LINEAR;
    char part[128];
    add_module(f, name, TP_MODULE_OTHER, 0);
    snprintf(part, sizeof(part), "%s.base_layer", name);
    const int base = add_matrix(f, part, kind, linear ? out : in, linear ? in : out);
    add_vector(f, base, "bias", out);
    snprintf(part, sizeof(part), "%s.lora_A", name);
    add_module(f, part, TP_MODULE_OTHER, 0);
    snprintf(part, sizeof(part), "%s.lora_A.default", name);
    add_linear(f, part, 3, in);
    snprintf(part, sizeof(part), "%s.lora_B", name);
    add_module(f, part, TP_MODULE_OTHER, 0);
    snprintf(part, sizeof(part), "%s.lora_B.default", name);
    add_linear(f, part, out, 3);
}

#define BLOCK "base_model.model.h.0."

/* GPT-2's names, which no plan of transformers speaks of; of the MLP's output layer
 * there are an original and a copy. */
static fixture
gpt2(void)
{
    fixture f = fixture_new(2);
    f.options.families = f.options.heuristics = f.options.large_layers = true;
    f.facts.model_type = "gpt2";
    f.facts.prefix = "";
    add_module(&f, BLOCK "attn", TP_MODULE_OTHER, 4, "num_heads", 4, "head_dim", 4,
               "embed_dim", 16, "split_size", 16);
    add_adapted(&f, BLOCK "attn.c_attn", TP_MODULE_CONV1D, 48, 16);
    add_adapted(&f, BLOCK "attn.c_proj", TP_MODULE_CONV1D, 16, 16);
    add_module(&f, BLOCK "mlp", TP_MODULE_OTHER, 0);
    add_adapted(&f, BLOCK "mlp.c_fc", TP_MODULE_CONV1D, 64, 16);
    add_module(&f, BLOCK "mlp.c_proj", TP_MODULE_OTHER, 0);
    add_matrix(&f, BLOCK "mlp.c_proj.original_module", TP_MODULE_CONV1D, 64, 16);
    add_module(&f, BLOCK "mlp.c_proj.modules_to_save", TP_MODULE_OTHER, 0);
    add_matrix(&f, BLOCK "mlp.c_proj.modules_to_save.default", TP_MODULE_CONV1D, 64,
               16);
    return f;
}

static void
test_blocks_are_known_through_adapters(void)
{
    fixture f = gpt2();
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, BLOCK "attn.c_attn.base_layer.weight", 0),
                      "column [16, 24]");
        CHECK_TEXT_EQ(local_of(&f, BLOCK "attn.c_attn.base_layer.bias", 0),
                      "column [24]");
        CHECK_TEXT_EQ(local_of(&f, BLOCK "attn.c_proj.base_layer.weight", 1),
                      "row [8, 16]");
        CHECK_INT_EQ(entry_of(&f, BLOCK "mlp.c_fc.base_layer.weight")->source,
                     TP_FROM_FAMILY);
    }
    fixture_free(&f);
}

static void
test_one_factor_is_sharded_into_the_runs_of_its_layer(void)
{
    fixture f = gpt2();
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, BLOCK "attn.c_attn.lora_B.default.weight", 1),
                      "column [24, 3]");
        CHECK(entry_of(&f, BLOCK "attn.c_attn.lora_B.default.weight")->layout ==
              entry_of(&f, BLOCK "attn.c_attn.base_layer.weight")->layout);
        CHECK_TEXT_EQ(local_of(&f, BLOCK "attn.c_proj.lora_A.default.weight", 0),
                      "row [3, 8]");
        CHECK_INT_EQ(entry_of(&f, BLOCK "attn.c_attn.lora_A.default.weight")->kind,
                     TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, BLOCK "attn.c_proj.lora_B.default.weight")->kind,
                     TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
test_a_copy_is_sharded_as_the_original(void)
{
    fixture f = gpt2();
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, BLOCK "mlp.c_proj.original_module.weight", 0),
                      "row [32, 16]");
        CHECK_TEXT_EQ(
            local_of(&f, BLOCK "mlp.c_proj.modules_to_save.default.weight", 0),
            "row [32, 16]");
    }
    fixture_free(&f);
}

/* An embedding and a head that are one tensor, of the head an original and a copy with
 * biases. Returns the module of the copy. */
static int
add_tied(fixture *f)
{
    const int embedding =
        add_matrix(f, "base_model.model.embed", TP_MODULE_EMBEDDING, 32, 16);
    f->facts.input_embedding = tp_model_parameter(f->model, embedding)->module;
    f->facts.output_head =
        add_module(f, "base_model.model.lm_head", TP_MODULE_OTHER, 0);
    const int head =
        add_module(f, "base_model.model.lm_head.original_module", TP_MODULE_LINEAR, 0);
    add_shaped(f, head, "weight", 2, (int64_t[]){32, 16}, embedding);
    add_shaped(f, head, "bias", 1, (int64_t[]){32}, -1);
    add_module(f, "base_model.model.lm_head.modules_to_save", TP_MODULE_OTHER, 0);
    const int copy = add_module(f, "base_model.model.lm_head.modules_to_save.default",
                                TP_MODULE_LINEAR, 0);
    add_shaped(f, copy, "weight", 2, (int64_t[]){32, 16}, -1);
    add_shaped(f, copy, "bias", 1, (int64_t[]){32}, -1);
    return copy;
}

#define COPY "base_model.model.lm_head.modules_to_save.default."
#define ORIGINAL "base_model.model.lm_head.original_module."

/* The head has no rule of its own, and follows the embedding. */
static void
test_a_copy_follows_a_tied_head(void)
{
    fixture f = gpt2();
    const int copy = add_tied(&f);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, ORIGINAL "weight", 1), "vocabulary [16, 16]");
        CHECK_TEXT_EQ(local_of(&f, COPY "weight", 1), "column [16, 16]");
        CHECK_TEXT_EQ(local_of(&f, ORIGINAL "bias", 1), "column [16]");
        CHECK_TEXT_EQ(local_of(&f, COPY "bias", 1), "column [16]");
        bool gathers = false;
        for (int i = 0; i < tp_plan_layer_count(f.plan); i++)
            gathers |= tp_plan_layer(f.plan, i)->module == copy &&
                       tp_plan_layer(f.plan, i)->gather_output;
        CHECK(gathers);
    }
    fixture_free(&f);
}

static void
test_a_copy_tied_to_what_is_sharded_otherwise_is_refused(void)
{
    fixture f = gpt2();
    add_tied(&f);
    const int weight = tp_model_parameter_count(f.model) - 2; /* of the copy */
    const int other = add_module(&f, "base_model.model.other", TP_MODULE_LINEAR, 0);
    add_shaped(&f, other, "weight", 2, (int64_t[]){32, 16}, weight);
    CHECK_REFUSED(&f, "it is one tensor with 'base_model.model.other.weight'");
}

/* A head with its original and a copy of `rows` that is trained in full. */
static void
add_copied_head(fixture *f, int rows, bool bias)
{
    add_module(f, "base_model.model.lm_head", TP_MODULE_OTHER, 0);
    add_matrix(f, "base_model.model.lm_head.original_module", TP_MODULE_LINEAR, 32, 16);
    add_module(f, "base_model.model.lm_head.modules_to_save", TP_MODULE_OTHER, 0);
    const int weight = add_matrix(f, "base_model.model.lm_head.modules_to_save.default",
                                  TP_MODULE_LINEAR, rows, 16);
    if (bias)
        add_vector(f, weight, "bias", rows);
    add_style(f, "lm_head", "colwise_gather_output");
}

static void
test_a_copy_that_is_unlike_its_original_is_refused(void)
{
    fixture f = gpt2();
    add_copied_head(&f, 34, false);
    CHECK_REFUSED(&f,
                  "weight' is trained in full in the place of 'base_model.model."
                  "lm_head.original_module.weight', but their shapes differ");
    f = gpt2();
    add_copied_head(&f, 32, true);
    CHECK_REFUSED(&f, "lm_head.original_module', which has no bias");
}

/* A rule for the copy's name, which the original has too, changes nothing. */
static void
test_a_copy_stays_full_where_ties_disagree(void)
{
    fixture f = gpt2();
    f.options.embedding_dim = 0;
    add_tied(&f);
    add_style(&f, "embed", "embedding_colwise");
    add_style(&f, "lm_head", "colwise_gather_output");
    add_style(&f, "h.*.mlp.c_fc", "colwise");
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, ORIGINAL "weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, COPY "weight")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
add_attention(fixture *f, const char *name)
{
    char part[128];
    const int module = add_module(f, name, TP_MODULE_OTHER, 4, "num_heads", 4,
                                  "head_dim", 4, "embed_dim", 16, "split_size", 16);
    add_shaped(f, module, "sinks", 1, (int64_t[]){4}, -1);
    snprintf(part, sizeof(part), "%s.c_attn", name);
    const int input = add_matrix(f, part, TP_MODULE_CONV1D, 16, 48);
    add_vector(f, input, "bias", 48);
    snprintf(part, sizeof(part), "%s.c_proj", name);
    add_matrix(f, part, TP_MODULE_CONV1D, 16, 16);
}

/* Also biases and what is no layer's, and the copy works on the heads of a rank. */
static void
test_a_copy_of_attention_follows_with_all_that_is_in_it(void)
{
    fixture f = gpt2();
    add_module(&f, "base_model.model.h.1.attn", TP_MODULE_OTHER, 0);
    add_attention(&f, "base_model.model.h.1.attn.original_module");
    add_module(&f, "base_model.model.h.1.attn.modules_to_save", TP_MODULE_OTHER, 0);
#define WHOLE "base_model.model.h.1.attn.modules_to_save.default"
    add_attention(&f, WHOLE);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, WHOLE ".c_attn.weight", 1), "column [16, 24]");
        CHECK_TEXT_EQ(local_of(&f, WHOLE ".c_attn.bias", 1), "column [24]");
        CHECK_TEXT_EQ(local_of(&f, WHOLE ".c_proj.weight", 1), "row [8, 16]");
        CHECK_TEXT_EQ(local_of(&f, WHOLE ".sinks", 1), "column [2]");
        const int64_t *heads = integer_of(&f, WHOLE, "num_heads");
        CHECK(heads != NULL && heads[1] == 2);
    }
    fixture_free(&f);
}

/* It works on the heads of a rank, whose layers are one deeper than it. */
static void
test_a_norm_beside_adapted_layers_sums_its_gradient(void)
{
    fixture f = gpt2();
    const int norm = add_module(&f, BLOCK "attn.q_norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, norm, "weight", 1, (int64_t[]){4}, -1);
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, BLOCK "attn.q_norm.weight")->kind, TP_REPLICATED_SUM);
    fixture_free(&f);
}

/* A rule for both factors would shard the one that is full. */
static void
test_factors_follow_their_layer_and_no_rule(void)
{
    fixture f = fixture_new(2);
    add_adapted(&f, "mlp.up", TP_MODULE_LINEAR, 32, 16);
    add_adapted(&f, "mlp.down", TP_MODULE_LINEAR, 16, 32);
    add_rule(&f, "up", "mlp\\.up", TP_PARTITION_COLUMN);
    add_rule(&f, "down", "mlp\\.down\\.base_layer", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "mlp.up.lora_A.default.weight")->kind, TP_REPLICATED);
        CHECK_TEXT_EQ(local_of(&f, "mlp.up.lora_B.default.weight", 0),
                      "column [16, 3]");
        CHECK_TEXT_EQ(local_of(&f, "mlp.down.lora_A.default.weight", 0), "row [3, 16]");
    }
    fixture_free(&f);
}

/* As before the adapters were there. */
static void
test_rules_are_tried_on_names_without_adapters(void)
{
    fixture f = fixture_new(2);
    add_adapted(&f, "base_model.model.mlp.up", TP_MODULE_LINEAR, 32, 16);
    add_adapted(&f, "base_model.model.mlp.down", TP_MODULE_LINEAR, 16, 32);
    add_rule(&f, "up", "mlp\\.up\\.weight$", TP_PARTITION_COLUMN);
    add_rule(&f, "down", "mlp\\.down$", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "base_model.model.mlp.up.base_layer.weight", 0),
                      "column [16, 16]");
        CHECK_TEXT_EQ(local_of(&f, "base_model.model.mlp.up.lora_B.default.weight", 0),
                      "column [16, 3]");
        CHECK_TEXT_EQ(local_of(&f, "base_model.model.mlp.down.base_layer.weight", 0),
                      "row [16, 16]");
    }
    fixture_free(&f);
}

/* A factor beside a Conv1D is a linear layer, whose dimensions are the other way
 * round. */
static void
test_a_factor_of_a_conv1d_has_its_dimension_and_pieces_the_other_way_round(void)
{
    static const struct {
        int dim, dims;
    } cases[] = {{1, 0}, {-1, 2}, {1, 2}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        fixture f = fixture_new(2);
        const bool pieces = cases[i].dims > 0;
        add_adapted(&f, "mlp.up", TP_MODULE_CONV1D, 32, 16);
        add_spec(&f, "up", "mlp\\.up",
                 (tp_spec){.partition = TP_PARTITION_COLUMN,
                           .dim = cases[i].dim,
                           .shape = {cases[i].dims, {-1, 2}, 0, {0}}});
        if (make_plan(&f)) {
            CHECK_TEXT_EQ(local_of(&f, "mlp.up.base_layer.weight", 1),
                          "column [16, 16]");
            CHECK_TEXT_EQ(local_of(&f, "mlp.up.lora_B.default.weight", 1),
                          "column [16, 3]");
            CHECK_TEXT_EQ(runs_of(&f, "mlp.up.lora_B.default.weight", 1),
                          pieces ? "8+8 24+8" : "16+16");
        }
        fixture_free(&f);
    }
}

static void
test_the_row_factor_of_a_conv1d_is_sharded_along_its_input(void)
{
    fixture f = fixture_new(2);
    add_adapted(&f, "mlp.down", TP_MODULE_CONV1D, 16, 32);
    add_spec(&f, "down", "mlp\\.down",
             (tp_spec){.partition = TP_PARTITION_ROW, .dim = 0});
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "mlp.down.base_layer.weight", 1), "row [16, 16]");
        CHECK_TEXT_EQ(local_of(&f, "mlp.down.lora_A.default.weight", 1), "row [3, 16]");
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_blocks_are_known_through_adapters);
    RUN(test_one_factor_is_sharded_into_the_runs_of_its_layer);
    RUN(test_a_copy_is_sharded_as_the_original);
    RUN(test_a_copy_follows_a_tied_head);
    RUN(test_a_copy_tied_to_what_is_sharded_otherwise_is_refused);
    RUN(test_a_copy_that_is_unlike_its_original_is_refused);
    RUN(test_a_copy_stays_full_where_ties_disagree);
    RUN(test_a_copy_of_attention_follows_with_all_that_is_in_it);
    RUN(test_a_norm_beside_adapted_layers_sums_its_gradient);
    RUN(test_factors_follow_their_layer_and_no_rule);
    RUN(test_rules_are_tried_on_names_without_adapters);
    RUN(test_a_factor_of_a_conv1d_has_its_dimension_and_pieces_the_other_way_round);
    RUN(test_the_row_factor_of_a_conv1d_is_sharded_along_its_input);
    return check_result();
}
