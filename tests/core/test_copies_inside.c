/* SPDX-License-Identifier: Apache-2.0 */
/* Copies that adapters train in full, inside of attention and of experts. */
#include "plan_fixture.h"

#define AROUND "base_model.model."

/* "name.original_module" and "name.modules_to_save.default", each a linear layer. */
static void
add_copied(fixture *f, const char *name, int out, int in)
{
    char part[128];
    add_module(f, name, TP_MODULE_OTHER, 0);
    snprintf(part, sizeof(part), "%s.original_module", name);
    add_linear(f, part, out, in);
    snprintf(part, sizeof(part), "%s.modules_to_save", name);
    add_module(f, part, TP_MODULE_OTHER, 0);
    snprintf(part, sizeof(part), "%s.modules_to_save.default", name);
    add_linear(f, part, out, in);
}

static void
test_a_copy_of_a_projection_works_on_the_heads_of_the_attention_around_it(void)
{
    fixture f = fixture_new(2);
    f.facts.prefix = "";
    add_module(&f, AROUND "attn", TP_MODULE_OTHER, 2, "num_heads", 3, "head_dim", 4);
    add_copied(&f, AROUND "attn.q_proj", 12, 8);
    add_style(&f, "attn.q_proj", "colwise");
    if (make_plan(&f)) {
        /* 3 heads of 4 over 2 ranks. */
        CHECK_TEXT_EQ(runs_of(&f, AROUND "attn.q_proj.original_module.weight", 0),
                      "0+8");
        CHECK_TEXT_EQ(
            runs_of(&f, AROUND "attn.q_proj.modules_to_save.default.weight", 0), "0+8");
        CHECK_INT_EQ(integer_of(&f, AROUND "attn", "num_heads")[0], 2);
    }
    fixture_free(&f);
}

/* The module around original and copy may be the one that has the counts. */
static void
test_a_copy_of_attention_whose_wrapper_has_the_counts_works_on_its_heads(void)
{
    fixture f = fixture_new(2);
    f.facts.prefix = "";
    add_module(&f, AROUND "attn", TP_MODULE_OTHER, 2, "num_heads", 3, "head_dim", 4);
    add_module(&f, AROUND "attn.original_module", TP_MODULE_OTHER, 0);
    add_linear(&f, AROUND "attn.original_module.q_proj", 12, 8);
    add_module(&f, AROUND "attn.modules_to_save", TP_MODULE_OTHER, 0);
    add_module(&f, AROUND "attn.modules_to_save.default", TP_MODULE_OTHER, 0);
    add_linear(&f, AROUND "attn.modules_to_save.default.q_proj", 12, 8);
    add_style(&f, "attn.q_proj", "colwise");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(
            runs_of(&f, AROUND "attn.modules_to_save.default.q_proj.weight", 0),
            runs_of(&f, AROUND "attn.original_module.q_proj.weight", 0));
        CHECK_TEXT_EQ(
            runs_of(&f, AROUND "attn.modules_to_save.default.q_proj.weight", 0), "0+8");
    }
    fixture_free(&f);
}

/* As dbrx's, which the module around them views. */
static void
add_stacked(fixture *f, const char *name)
{
    char part[128];
    add_module(f, name, TP_MODULE_OTHER, 1, "ffn_hidden_size", 6);
    snprintf(part, sizeof(part), "%s.mlp", name);
    const int at = add_module(f, part, TP_MODULE_OTHER, 1, "moe_num_experts", 3);
    add_shaped(f, at, "w1", 2, (int64_t[]){18, 8}, -1);
    add_shaped(f, at, "v1", 2, (int64_t[]){18, 8}, -1);
    add_shaped(f, at, "w2", 2, (int64_t[]){18, 8}, -1);
}

static void
test_a_copy_of_stacked_experts_is_viewed_as_narrow_as_they_are(void)
{
    fixture f = fixture_new(2);
    f.facts.prefix = "";
    f.options.families = f.options.heuristics = true;
    add_module(&f, AROUND "ffn", TP_MODULE_OTHER, 0);
    add_stacked(&f, AROUND "ffn.original_module");
    add_module(&f, AROUND "ffn.modules_to_save", TP_MODULE_OTHER, 0);
    add_stacked(&f, AROUND "ffn.modules_to_save.default");
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, AROUND "ffn.original_module.mlp.w2", 1),
                      "column [9, 8]");
        CHECK_TEXT_EQ(local_of(&f, AROUND "ffn.modules_to_save.default.mlp.w2", 1),
                      "column [9, 8]");
        const int64_t *width =
            integer_of(&f, AROUND "ffn.modules_to_save.default", "ffn_hidden_size");
        CHECK(width != NULL && width[0] == 3 && width[1] == 3);
        CHECK_INT_EQ(layer_of(&f, AROUND "ffn.modules_to_save.default")->kind,
                     TP_EXPERTS);
    }
    fixture_free(&f);
}

static void
test_a_copy_tied_to_what_has_other_runs_is_refused(void)
{
    fixture f = fixture_new(2);
    f.facts.prefix = "";
    add_copied(&f, AROUND "up", 16, 8);
    const int copy = tp_model_parameter_count(f.model) - 1;
    const int other = add_module(&f, AROUND "other", TP_MODULE_LINEAR, 0);
    add_shaped(&f, other, "weight", 2, (int64_t[]){16, 8}, copy);
    add_rule(&f, "up", "up", TP_PARTITION_COLUMN);
    add_spec(&f, "other", "other",
             (tp_spec){.partition = TP_PARTITION_COLUMN,
                       .dim = -1,
                       .shape = {2, {2, -1}, 0, {0}}});
    f.options.strict = false;
    const int refused = try_plan(&f);
    CHECK_INT_EQ(refused, -1);
    CHECK_INT_EQ(f.err.code, TP_VALUE);
    CHECK_TEXT_HAS(tp_error_text(&f.err), AROUND "other.weight'");
    fixture_free(&f);
}

/* A whole layer is trained in full: the attention in the copy has heads of its own. */
static void
test_attention_inside_of_a_copy_works_on_the_heads_of_a_rank(void)
{
    static const char *const parts[] = {"original_module", "modules_to_save.default"};
    fixture f = fixture_new(2);
    char name[128];
    f.facts.prefix = "";
    add_module(&f, AROUND "layer", TP_MODULE_OTHER, 0);
    for (int i = 0; i < 2; i++) {
        snprintf(name, sizeof(name), AROUND "layer.%s", parts[i]);
        add_module(&f, name, TP_MODULE_OTHER, 0);
        snprintf(name, sizeof(name), AROUND "layer.%s.attn", parts[i]);
        add_module(&f, name, TP_MODULE_OTHER, 2, "num_heads", 3, "head_dim", 4);
        snprintf(name, sizeof(name), AROUND "layer.%s.attn.q_proj", parts[i]);
        add_linear(&f, name, 12, 8);
    }
    add_style(&f, "layer.attn.q_proj", "colwise");
    if (make_plan(&f)) {
        for (int i = 0; i < 2; i++) {
            snprintf(name, sizeof(name), AROUND "layer.%s.attn", parts[i]);
            const int64_t *heads = integer_of(&f, name, "num_heads");
            CHECK(heads != NULL && heads[0] == 2 && heads[1] == 1);
        }
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_a_copy_of_a_projection_works_on_the_heads_of_the_attention_around_it);
    RUN(test_a_copy_of_attention_whose_wrapper_has_the_counts_works_on_its_heads);
    RUN(test_a_copy_of_stacked_experts_is_viewed_as_narrow_as_they_are);
    RUN(test_a_copy_tied_to_what_has_other_runs_is_refused);
    RUN(test_attention_inside_of_a_copy_works_on_the_heads_of_a_rank);
    return check_result();
}
