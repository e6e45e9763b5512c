/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

/* Two layers of an MLP. */
static void
add_mlps(fixture *f)
{
    add_module(f, "", TP_MODULE_OTHER, 0);
    add_linear(f, "model.layers.0.mlp.up_proj", 16, 8);
    add_linear(f, "model.layers.0.mlp.down_proj", 8, 16);
    add_linear(f, "model.layers.1.mlp.up_proj", 16, 8);
    add_linear(f, "model.layers.1.mlp.down_proj", 8, 16);
}

static const char *
only_note(const fixture *f)
{
    CHECK_INT_EQ(tp_plan_message_count(f->plan), 1);
    return tp_plan_message_count(f->plan) > 0 ? tp_plan_message(f->plan, 0)->text : "";
}

static void
test_the_first_rule_that_matches_decides_and_one_message_names_the_other(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    add_rule(&f, "layer_specs[0]", ".*up_proj.*", TP_PARTITION_COLUMN);
    add_rule(&f, "layer_specs[1]", ".*mlp.*", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "model.layers.1.mlp.up_proj.weight")->kind,
                     TP_COLUMN);
        CHECK_INT_EQ(entry_of(&f, "model.layers.1.mlp.down_proj.weight")->kind, TP_ROW);
        CHECK_TEXT_EQ(only_note(&f),
                      "rules 'layer_specs[0]' and 'layer_specs[1]' both match "
                      "'model.layers.0.mlp.up_proj.weight' and ask for different "
                      "things; the first one, 'layer_specs[0]', decides");
    }
    fixture_free(&f);
}

static void
test_rules_that_ask_for_the_same_need_no_message(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    add_rule(&f, "a", ".*layers\\.0.*up_proj.*", TP_PARTITION_COLUMN);
    add_rule(&f, "b", ".*up_proj.*", TP_PARTITION_COLUMN);
    add_style(&f, "model.layers.*.mlp.up_proj", "rowwise");
    if (make_plan(&f)) {
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
        CHECK_TEXT_EQ(entry_of(&f, "model.layers.1.mlp.up_proj.weight")->rule, "b");
    }
    fixture_free(&f);
}

static void
test_a_rule_that_matches_nothing_is_told_with_near_names(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    add_rule(&f, "layer_specs[0]", ".*\\.mlp\\.up_porj\\.weight$", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_HAS(only_note(&f), "rule 'layer_specs[0]' (partition_config)");
        CHECK_TEXT_HAS(only_note(&f), "did you mean 'mlp.up_proj.weight'");
    }
    fixture_free(&f);
}

static void
test_a_rule_that_is_refused_is_told_what_to_do_before_near_names(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    add_rule(&f, "layer_specs[0]", ".*\\.mlp\\.up_porj\\.weight$", TP_PARTITION_COLUMN);
    f.options.strict = true;
    CHECK_REFUSED(&f,
                  "; correct it, or switch strict_mode off; did you mean "
                  "'mlp.up_proj.weight' or 'mlp.down_proj.weight'?");
}

static void
test_a_transformers_pattern_that_matches_nothing_is_told_with_near_names(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    add_style(&f, "model.layers.*.mlp.upproj", "colwise");
    f.options.strict = false;
    if (make_plan(&f))
        CHECK_TEXT_HAS(only_note(&f), "did you mean 'model.layers.*.mlp.up_proj'");
    fixture_free(&f);
}

static void
test_a_transformers_pattern_that_matched_under_a_longer_name_is_not_told(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    f.facts.prefix = "language_model";
    add_style(&f, "layers.*.mlp.up_proj", "colwise");
    add_style(&f, "model.layers.*.mlp.up_proj", "colwise");
    f.options.strict = false;
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    fixture_free(&f);
}

static void
test_a_star_takes_any_text_where_no_name_has_an_index_there(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    add_style(&f, "*.up_proj", "colwise");
    add_style(&f, "layers.*.down_proj", "rowwise");
    add_style(&f, "model.layers.1.*.up_proj", "rowwise"); /* too late */
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.mlp.up_proj.weight")->kind,
                     TP_COLUMN);
        CHECK_INT_EQ(entry_of(&f, "model.layers.1.mlp.up_proj.weight")->kind,
                     TP_COLUMN);
        CHECK_INT_EQ(entry_of(&f, "model.layers.1.mlp.down_proj.weight")->kind, TP_ROW);
        CHECK_TEXT_HAS(only_note(&f),
                       "so it stands for any text: '*.up_proj', "
                       "'layers.*.down_proj'");
    }
    fixture_free(&f);
}

static void
test_a_star_is_an_index_where_any_name_has_one_there(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    add_linear(&f, "model.layers.0.up_proj", 16, 8);
    add_style(&f, "model.layers.*.up_proj", "colwise");
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.up_proj.weight")->kind, TP_COLUMN);
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.mlp.up_proj.weight")->kind,
                     TP_REPLICATED);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_a_plan_that_follows_skips_alone_says_so(void)
{
    static const struct {
        const char *second, *third;
        tp_partition partition;
        bool skips;
    } rows[] = {
        {".*down_proj.*", NULL, TP_PARTITION_SKIP, true},
        {".*down_porj.*", NULL, TP_PARTITION_COLUMN, true}, /* matches nothing */
        {".*down_proj.*", NULL, TP_PARTITION_ROW, false},
        {".*down_proj.*", "model.layers.*.mlp.down_proj", TP_PARTITION_SKIP, true},
        {".*down_porj.*", "model.layers.*.mlp.down_proj", TP_PARTITION_SKIP, false},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        fixture f = fixture_new(2);
        add_mlps(&f);
        add_rule(&f, "a", ".*up_proj\\.weight$", TP_PARTITION_SKIP);
        add_rule(&f, "b", rows[i].second, rows[i].partition);
        if (rows[i].third != NULL)
            add_style(&f, rows[i].third, "replicated_with_grad_allreduce");
        if (make_plan(&f))
            CHECK_INT_EQ(tp_plan_skips_all(f.plan), rows[i].skips);
        fixture_free(&f);
    }
    fixture f = fixture_new(2); /* and one that follows no rule does not */
    add_mlps(&f);
    if (make_plan(&f))
        CHECK(!tp_plan_skips_all(f.plan));
    fixture_free(&f);
}

static void
test_rules_for_other_model_types_are_not_told(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    f.facts.model_type = "llama";
    tp_rule rule = {.source = TP_FROM_CONFIG,
                    .spec = {.partition = TP_PARTITION_COLUMN, .dim = -1},
                    .pattern_count = 1,
                    .model_type_count = 1};
    rule.label = fixture_copy("other");
    rule.patterns = calloc(1, sizeof(*rule.patterns));
    rule.model_types = calloc(1, sizeof(*rule.model_types));
    rule.model_types[0] = fixture_copy("bloom");
    CHECK_OK(tp_regex_new(".*up_proj.*", NULL, &rule.patterns[0], &f.err), &f.err);
    const int added = tp_rules_add(f.rules, &rule, &f.err); /* takes the rule */
    CHECK_OK(added, &f.err);
    if (make_plan(&f)) {
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_strict_refuses_a_rule_that_matches_nothing(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    f.options.strict = true;
    add_rule(&f, "a", ".*mlp.*", TP_PARTITION_SKIP);
    add_rule(&f, "b", ".*attn.*", TP_PARTITION_COLUMN);
    CHECK_REFUSED(&f, "rule 'b' (partition_config) matches nothing");
}

static void
test_strict_refuses_a_preset_only_when_none_of_its_rows_matches(void)
{
    fixture f = fixture_new(2);
    add_mlps(&f);
    f.options.strict = true;
    add_rule(&f, "a", ".*mlp.*", TP_PARTITION_SKIP);
    add_preset(&f, "bloom");
    CHECK_REFUSED(&f, "rule 'preset bloom[0]' (preset) matches nothing");

    f = fixture_new(2);
    add_mlps(&f);
    f.options.strict = true;
    add_preset(&f, "llama");
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.mlp.up_proj.weight")->kind,
                     TP_COLUMN);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 2);
    }
    fixture_free(&f);
}

static void
test_strict_refuses_linear_layers_without_a_rule_and_names_some(void)
{
    fixture f = fixture_new(2);
    f.options.strict = true;
    for (int i = 0; i < 7; i++) {
        char name[32];
        snprintf(name, sizeof(name), "layers.%d.up", i);
        add_linear(&f, name, 16, 8);
    }
    add_matrix(&f, "embed", TP_MODULE_EMBEDDING, 16, 8);
    add_rule(&f, "a", "layers\\.0\\.up", TP_PARTITION_COLUMN);
    CHECK_REFUSED(&f,
                  "no rule matches 6 linear layers: 'layers.1.up', 'layers.2.up', "
                  "'layers.3.up', 'layers.4.up', 'layers.5.up', ...");
}

static void
test_a_skip_with_a_summed_gradient_keeps_the_weight_replicated(void)
{
    fixture f = fixture_new(2);
    const int weight = add_linear(&f, "router", 4, 8);
    add_vector(&f, weight, "bias", 4);
    add_style(&f, "router", "replicated_with_grad_allreduce");
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "router.weight")->kind, TP_REPLICATED_SUM);
        CHECK_INT_EQ(entry_of(&f, "router.bias")->kind, TP_REPLICATED_SUM);
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
add_ends(fixture *f)
{
    const int embedding = add_matrix(f, "embed", TP_MODULE_EMBEDDING, 32, 8);
    f->facts.input_embedding = tp_model_parameter(f->model, embedding)->module;
    add_linear(f, "lm_head", 32, 8);
    add_linear(f, "score", 3, 8);
    add_linear(f, "up", 16, 8);
}

static void
test_embedding_and_head_are_sharded_by_default_beside_a_configuration(void)
{
    fixture f = fixture_new(2);
    add_ends(&f);
    add_rule(&f, "a", "up", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "embed.weight", 0), "hidden [32, 4]");
        CHECK_INT_EQ(entry_of(&f, "embed.weight")->source, TP_FROM_DEFAULT);
        CHECK_TEXT_EQ(local_of(&f, "lm_head.weight", 0), "column [16, 8]");
        CHECK(layer_of(&f, "lm_head")->gather_output);
        CHECK_INT_EQ(entry_of(&f, "score.weight")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
}

static void
test_the_embedding_dimension_is_an_option(void)
{
    fixture f = fixture_new(2);
    add_ends(&f);
    f.options.embedding_dim = 0;
    add_rule(&f, "a", "up", TP_PARTITION_COLUMN);
    if (make_plan(&f))
        CHECK_TEXT_EQ(local_of(&f, "embed.weight", 0), "vocabulary [16, 8]");
    fixture_free(&f);
}

static void
test_no_default_beside_a_transformers_plan_or_when_switched_off(void)
{
    fixture f = fixture_new(2);
    add_ends(&f);
    add_style(&f, "up", "colwise");
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "embed.weight")->kind, TP_REPLICATED);
        CHECK_INT_EQ(entry_of(&f, "lm_head.weight")->kind, TP_REPLICATED);
    }
    fixture_free(&f);
    f = fixture_new(2);
    add_ends(&f);
    f.options.defaults = false;
    add_rule(&f, "a", "up", TP_PARTITION_COLUMN);
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "embed.weight")->kind, TP_REPLICATED);
    fixture_free(&f);
}

static void
test_a_default_that_does_not_fit_leaves_the_weight_replicated(void)
{
    fixture f = fixture_new(4);
    f.facts.output_head = 0;
    add_linear(&f, "score", 3, 8);
    add_linear(&f, "up", 16, 8);
    add_rule(&f, "a", "up", TP_PARTITION_COLUMN);
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "score.weight")->kind, TP_REPLICATED);
    fixture_free(&f);
}

static void
test_a_style_of_a_module_without_weights_is_not_told(void)
{
    fixture f = fixture_new(2);
    add_linear(&f, "attn.v_proj", 8, 8);
    add_module(&f, "attn.v_norm", TP_MODULE_OTHER, 0);
    add_style(&f, "attn.v_norm", "replicated_with_grad_allreduce");
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
    fixture_free(&f);
}

static void
test_a_style_that_matches_nothing_is_told_where_none_of_its_plan_matches(void)
{
    for (int matches = 0; matches < 2; matches++) {
        fixture f = fixture_new(2);
        add_linear(&f, "attn.v_proj", 8, 8);
        add_style(&f, "attn.w_norm", "replicated_with_grad_allreduce");
        if (matches)
            add_style(&f, "attn.v_proj", "colwise");
        if (make_plan(&f)) {
            CHECK_INT_EQ(tp_plan_message_count(f.plan), 1 - matches);
            if (!matches)
                CHECK_TEXT_HAS(tp_plan_message(f.plan, 0)->text, "'attn.w_norm'");
        }
        fixture_free(&f);
    }
}

int
main(void)
{
    RUN(test_a_style_of_a_module_without_weights_is_not_told);
    RUN(test_a_style_that_matches_nothing_is_told_where_none_of_its_plan_matches);
    RUN(test_the_first_rule_that_matches_decides_and_one_message_names_the_other);
    RUN(test_rules_that_ask_for_the_same_need_no_message);
    RUN(test_a_rule_that_matches_nothing_is_told_with_near_names);
    RUN(test_a_rule_that_is_refused_is_told_what_to_do_before_near_names);
    RUN(test_a_transformers_pattern_that_matches_nothing_is_told_with_near_names);
    RUN(test_a_transformers_pattern_that_matched_under_a_longer_name_is_not_told);
    RUN(test_a_star_takes_any_text_where_no_name_has_an_index_there);
    RUN(test_a_star_is_an_index_where_any_name_has_one_there);
    RUN(test_a_plan_that_follows_skips_alone_says_so);
    RUN(test_rules_for_other_model_types_are_not_told);
    RUN(test_strict_refuses_a_rule_that_matches_nothing);
    RUN(test_strict_refuses_a_preset_only_when_none_of_its_rows_matches);
    RUN(test_strict_refuses_linear_layers_without_a_rule_and_names_some);
    RUN(test_a_skip_with_a_summed_gradient_keeps_the_weight_replicated);
    RUN(test_embedding_and_head_are_sharded_by_default_beside_a_configuration);
    RUN(test_the_embedding_dimension_is_an_option);
    RUN(test_no_default_beside_a_transformers_plan_or_when_switched_off);
    RUN(test_a_default_that_does_not_fit_leaves_the_weight_replicated);
    return check_result();
}
