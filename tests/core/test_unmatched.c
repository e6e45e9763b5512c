/* SPDX-License-Identifier: Apache-2.0 */
/* What is said of rules that match nothing. */
#include "plan_fixture.h"

/* A model of one layer with an "mlp", and no rules. */
static fixture
mlp_new(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "model", TP_MODULE_OTHER, 0);
    add_module(&f, "model.layers", TP_MODULE_OTHER, 0);
    add_module(&f, "model.layers.0", TP_MODULE_OTHER, 0);
    add_linear(&f, "model.layers.0.up_proj", 8, 8);
    add_linear(&f, "model.layers.0.down_proj", 8, 8);
    return f;
}

static void
check_told(fixture *f, const char *part)
{
    if (make_plan(f) && CHECK_INT_EQ(tp_plan_message_count(f->plan), 1))
        CHECK_TEXT_HAS(tp_plan_message(f->plan, 0)->text, part);
    fixture_free(f);
}

/* Near names are those of the pattern as a name, however its parts are written. */
static void
test_patterns_of_every_form_are_held_against_names(void)
{
    static const char *const patterns[] = {
        "^model\\.layers\\.\\d+\\.up_porj\\.weight$",
        "model\\.layers\\.\\d\\.up_porj\\.weight",
        ".+layers\\.0\\.up_porj\\.weight",
        "model.layers.0.up_porj.weight",
    };
    for (size_t i = 0; i < sizeof(patterns) / sizeof(patterns[0]); i++) {
        fixture f = mlp_new();
        add_rule(&f, "r", patterns[i], TP_PARTITION_COLUMN);
        check_told(&f, "up_proj.weight'");
    }
    /* Nothing is near to what matches anything. */
    fixture f = mlp_new();
    add_rule(&f, "r", ".*.*x", TP_PARTITION_COLUMN);
    check_told(&f, "matches nothing in the model: pattern '.*.*x'");
}

static void
test_further_patterns_of_a_rule_are_counted(void)
{
    fixture f = mlp_new();
    tp_rule rule = {.source = TP_FROM_CONFIG, .spec = TP_NO_SPEC, .pattern_count = 3};
    rule.label = fixture_copy("three");
    rule.patterns = calloc(3, sizeof(*rule.patterns));
    for (int i = 0; i < 3; i++)
        CHECK_OK(tp_regex_new("nothing", NULL, &rule.patterns[i], &f.err), &f.err);
    const int added = tp_rules_add(f.rules, &rule, &f.err); /* takes the rule */
    CHECK_OK(added, &f.err);
    check_told(&f, "pattern 'nothing' and 2 more");
}

static void
test_a_rule_without_a_pattern_matches_nothing(void)
{
    fixture f = mlp_new();
    tp_rule rule = {.source = TP_FROM_CONFIG, .spec = TP_NO_SPEC};
    rule.label = fixture_copy("none");
    const int added = tp_rules_add(f.rules, &rule, &f.err); /* takes the rule */
    CHECK_OK(added, &f.err);
    check_told(&f, "rule 'none' (partition_config) matches nothing in the model");
}

/* A longer pattern that only ends alike, or begins alike, is another one. */
static void
test_an_entry_is_told_where_the_longer_one_is_another(void)
{
    static const char *const patterns[] = {"s.*.up_proj", "layers.*.up_porj"};
    for (int i = 0; i < 2; i++) {
        fixture f = mlp_new();
        f.facts.prefix = "";
        CHECK_OK(tp_rules_add_style(f.rules, patterns[i], "colwise", true, &f.err),
                 &f.err);
        add_style(&f, "model.layers.*.up_proj", "colwise");
        CHECK_REFUSED(&f, "correct it, or take it out of the plan");
    }
}

/* A plan that is put together from those of the parts of a model has both. */
static void
test_an_entry_that_matched_under_a_longer_name_is_not_told(void)
{
    fixture f = mlp_new();
    f.facts.prefix = "language_model";
    CHECK_OK(tp_rules_add_style(f.rules, "layers.*.up_proj", "colwise", true, &f.err),
             &f.err);
    add_style(&f, "model.layers.*.up_proj", "colwise");
    if (make_plan(&f)) {
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 0);
        CHECK_INT_EQ(entry_of(&f, "model.layers.0.up_proj.weight")->kind, TP_COLUMN);
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_patterns_of_every_form_are_held_against_names);
    RUN(test_further_patterns_of_a_rule_are_counted);
    RUN(test_a_rule_without_a_pattern_matches_nothing);
    RUN(test_an_entry_is_told_where_the_longer_one_is_another);
    RUN(test_an_entry_that_matched_under_a_longer_name_is_not_told);
    return check_result();
}
