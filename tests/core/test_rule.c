/* SPDX-License-Identifier: Apache-2.0 */
#include "rules/rule.h"

#include <stdlib.h>

#include "base/text.h"
#include "check.h"

#define ROOM 8

static tp_rules *
new_rules(void)
{
    tp_error err = TP_NO_ERROR;
    tp_rules *rules = NULL;
    CHECK_OK(tp_rules_new(&rules, &err), &err);
    return rules;
}

static char *
copy(const char *data)
{
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    char *out = NULL;
    tp_text_add(&text, "%s", data);
    CHECK_OK(tp_text_take(&text, &out, &err), &err);
    return out;
}

/* A rule of the configuration with up to two patterns and up to one model type. */
static void
add_rule(tp_rules *rules, const char *first, const char *second, const char *model_type)
{
    tp_error err = TP_NO_ERROR;
    tp_rule rule = {.source = TP_FROM_CONFIG, .spec = {.dim = -1}, .label = copy("r")};
    rule.patterns = calloc(2, sizeof(*rule.patterns));
    CHECK_OK(tp_regex_new(first, NULL, &rule.patterns[0], &err), &err);
    rule.pattern_count = 1;
    if (second != NULL) {
        CHECK_OK(tp_regex_new(second, NULL, &rule.patterns[1], &err), &err);
        rule.pattern_count = 2;
    }
    if (model_type != NULL) {
        rule.model_types = calloc(1, sizeof(*rule.model_types));
        rule.model_types[0] = copy(model_type);
        rule.model_type_count = 1;
    }
    const int added = tp_rules_add(rules, &rule, &err); /* takes the rule */
    CHECK_OK(added, &err);
}

static int
find(const tp_rules *rules, tp_query query, int *found, int room)
{
    tp_error err = TP_NO_ERROR;
    const int count = tp_rules_find(rules, &query, found, room, &err);
    CHECK_TEXT_EQ(tp_error_text(&err), "no error");
    tp_error_clear(&err);
    return count;
}

static int
count_of(const tp_rules *rules, const char *parameter, const char *module,
         const char *model_type)
{
    int found[ROOM];
    return find(rules, (tp_query){parameter, module, model_type, "", NULL}, found,
                ROOM);
}

static void
test_every_source_has_its_name(void)
{
    const char *const names[] = {"partition_config", "preset",  "tp_plan", "family",
                                 "heuristic",        "default", "-"};
    for (int i = TP_FROM_CONFIG; i <= TP_FROM_NOTHING; i++)
        CHECK_TEXT_EQ(tp_source_name((tp_source)i), names[i]);
}

static void
test_rules_that_match_come_in_their_order(void)
{
    tp_rules *rules = new_rules();
    int found[ROOM];
    add_rule(rules, "never$", NULL, NULL);
    add_rule(rules, ".*weight$", NULL, NULL);
    add_rule(rules, ".*bias$", NULL, NULL);
    add_rule(rules, ".*up_proj", NULL, NULL);
    const tp_query query = {"mlp.up_proj.weight", NULL, NULL, "", NULL};
    CHECK_INT_EQ(find(rules, query, found, ROOM), 2);
    CHECK_INT_EQ(found[0], 1);
    CHECK_INT_EQ(found[1], 3);
    tp_rules_free(rules);
}

static void
test_the_count_goes_on_where_the_room_ends(void)
{
    tp_rules *rules = new_rules();
    int found[2] = {-7, -7};
    for (int i = 0; i < 40; i++)
        add_rule(rules, ".*", NULL, NULL);
    const tp_query query = {"w", NULL, NULL, "", NULL};
    CHECK_INT_EQ(find(rules, query, found, 1), 40);
    CHECK_INT_EQ(found[0], 0);
    CHECK_INT_EQ(found[1], -7);
    CHECK_INT_EQ(find(rules, query, NULL, 0), 40);
    CHECK_INT_EQ(tp_rules_count(rules), 40);
    tp_rules_free(rules);
}

static void
test_any_pattern_of_a_rule_is_enough_and_counts_once(void)
{
    tp_rules *rules = new_rules();
    add_rule(rules, "a", ".*b", NULL);
    CHECK_INT_EQ(count_of(rules, "a.x", NULL, NULL), 1);
    CHECK_INT_EQ(count_of(rules, "x.b", NULL, NULL), 1);
    CHECK_INT_EQ(count_of(rules, "a.b", NULL, NULL), 1);
    CHECK_INT_EQ(count_of(rules, "x.y", NULL, NULL), 0);
    tp_rules_free(rules);
}

static void
test_a_pattern_is_tried_on_the_module_when_the_parameter_fails(void)
{
    tp_rules *rules = new_rules();
    add_rule(rules, ".*\\.up_proj$", NULL, NULL);
    CHECK_INT_EQ(count_of(rules, "mlp.up_proj.weight", "mlp.up_proj", NULL), 1);
    CHECK_INT_EQ(count_of(rules, "mlp.up_proj.weight", NULL, NULL), 0);
    CHECK_INT_EQ(count_of(rules, "mlp.up_proj", "other", NULL), 1);
    tp_rules_free(rules);
}

static void
test_model_types_compare_without_case_and_need_a_model_type(void)
{
    tp_rules *rules = new_rules();
    add_rule(rules, ".*", NULL, "LLaMA");
    CHECK_INT_EQ(count_of(rules, "w", NULL, "llama"), 1);
    CHECK_INT_EQ(count_of(rules, "w", NULL, "Llama"), 1);
    CHECK_INT_EQ(count_of(rules, "w", NULL, "llama4"), 0);
    CHECK_INT_EQ(count_of(rules, "w", NULL, NULL), 0);
    tp_rules_free(rules);
}

static void
test_a_preset_adds_its_rows_with_labels(void)
{
    tp_error err = TP_NO_ERROR;
    tp_rules *rules = new_rules();
    int found[ROOM];
    add_rule(rules, "never$", NULL, NULL);
    CHECK_OK(tp_rules_add_preset(rules, "LLAMA", &err), &err);
    CHECK_INT_EQ(tp_rules_count(rules), 5);
    CHECK_TEXT_EQ(tp_rules_at(rules, 1)->label, "preset llama[0]");
    CHECK_TEXT_EQ(tp_rules_at(rules, 4)->label, "preset llama[3]");
    const tp_query query = {"model.layers.0.mlp.down_proj.weight", NULL, NULL, "",
                            NULL};
    CHECK_INT_EQ(find(rules, query, found, ROOM), 1);
    CHECK_INT_EQ(found[0], 3);
    CHECK_INT_EQ(tp_rules_at(rules, 3)->source, TP_FROM_PRESET);
    CHECK_INT_EQ(tp_rules_at(rules, 3)->spec.partition, TP_PARTITION_ROW);
    tp_rules_free(rules);
}

static void
test_an_unknown_preset_or_style_adds_nothing(void)
{
    tp_error err = TP_NO_ERROR;
    tp_rules *rules = new_rules();
    CHECK_FAILS(tp_rules_add_preset(rules, "qwen3", &err), TP_VALUE, &err, "'qwen2'");
    CHECK_FAILS(tp_rules_add_style(rules, "lm_head", "columnwise", false, &err),
                TP_VALUE, &err, "tp_plan['lm_head']: unknown style 'columnwise'");
    CHECK_INT_EQ(tp_rules_count(rules), 0);
    tp_rules_free(rules);
}

static void
test_a_transformers_rule_matches_parameter_or_module_with_the_prefix(void)
{
    tp_error err = TP_NO_ERROR;
    tp_rules *rules = new_rules();
    int found[ROOM];
    CHECK_OK(tp_rules_add_style(rules, "layers.*.mlp.up_proj", "colwise", false, &err),
             &err);
    CHECK_OK(tp_rules_add_style(rules, "layers.*.mlp.experts.up", "packed_colwise",
                                false, &err),
             &err);
    const tp_query module = {"model.layers.3.mlp.up_proj.weight",
                             "model.layers.3.mlp.up_proj", NULL, "model", NULL};
    CHECK_INT_EQ(find(rules, module, found, ROOM), 1);
    CHECK_INT_EQ(found[0], 0);
    const tp_query parameter = {"layers.3.mlp.experts.up", "layers.3.mlp.experts", NULL,
                                "model", NULL};
    CHECK_INT_EQ(find(rules, parameter, found, ROOM), 1);
    CHECK_INT_EQ(found[0], 1);
    const tp_query no_module = {"model.layers.3.mlp.up_proj.weight", NULL, NULL,
                                "model", NULL};
    CHECK_INT_EQ(find(rules, no_module, found, ROOM), 0);
    const tp_query no_prefix = {module.parameter, module.module, NULL, "", NULL};
    CHECK_INT_EQ(find(rules, no_prefix, found, ROOM), 0);

    const tp_rule *rule = tp_rules_at(rules, 1);
    CHECK_INT_EQ(rule->source, TP_FROM_HF);
    CHECK_TEXT_EQ(rule->label, "layers.*.mlp.experts.up: packed_colwise");
    CHECK_TEXT_EQ(rule->hf_pattern, "layers.*.mlp.experts.up");
    CHECK_INT_EQ(rule->spec.shape.sizes[0], 2);
    tp_rules_free(rules);
}

static int
refuse_to_match(void *context, const char *subject, size_t size, tp_error *err)
{
    (void)context;
    return tp_fail(err, TP_LIMIT, "refused '%.*s'", (int)size, subject);
}

static void
release_nothing(void *context)
{
    (void)context;
}

/* Rules of one pattern, whose fallback refuses to match. It gets a subject that is not
 * ASCII, whatever the pattern. */
static tp_rules *
refusing_rules(const char *pattern)
{
    tp_error err = TP_NO_ERROR;
    tp_rules *rules = new_rules();
    const tp_matcher matcher = {NULL, refuse_to_match, release_nothing};
    tp_rule rule = {.source = TP_FROM_CONFIG, .spec = {.dim = -1}, .label = copy("r")};
    rule.patterns = calloc(1, sizeof(*rule.patterns));
    rule.pattern_count = 1;
    CHECK_OK(tp_regex_new(pattern, &matcher, &rule.patterns[0], &err), &err);
    const int added = tp_rules_add(rules, &rule, &err); /* takes the rule */
    CHECK_OK(added, &err);
    return rules;
}

static void
test_a_pattern_that_fails_to_match_ends_the_search_with_its_error(void)
{
    tp_error err = TP_NO_ERROR;
    tp_rules *rules = refusing_rules(".");
    const tp_query query = {"\xc3\xa9", NULL, NULL, "", NULL};
    CHECK_FAILS(tp_rules_find(rules, &query, NULL, 0, &err), TP_LIMIT, &err, "refused");
    tp_rules_free(rules);
    tp_rules_free(NULL);
}

static void
test_a_pattern_that_fails_on_the_module_ends_the_search_as_well(void)
{
    tp_error err = TP_NO_ERROR;
    tp_rules *rules = refusing_rules("b");
    const tp_query query = {"a", "b\xc3\xa9", NULL, "", NULL};
    CHECK_FAILS(tp_rules_find(rules, &query, NULL, 0, &err), TP_LIMIT, &err,
                "refused 'b\xc3\xa9'");
    tp_rules_free(rules);
}

/* A rule that matches all, with its specification and style. */
static void
add_any(tp_rules *rules, tp_partition partition, bool sum_gradient, tp_style style)
{
    tp_error err = TP_NO_ERROR;
    tp_rule rule = {.source = TP_FROM_CONFIG, .style = style, .label = copy("r")};
    rule.spec =
        (tp_spec){.partition = partition, .dim = -1, .sum_gradient = sum_gradient};
    const int added = tp_rules_add(rules, &rule, &err); /* takes the rule */
    CHECK_OK(added, &err);
}

static void
test_rules_only_skip_where_none_shards_sums_or_speaks_of_a_module(void)
{
    tp_rules *rules = new_rules();
    CHECK(!tp_rules_only_skip(rules)); /* there are none */
    add_any(rules, TP_PARTITION_SKIP, false, TP_STYLE_SHARD);
    add_any(rules, TP_PARTITION_SKIP, false, TP_STYLE_SHARD);
    CHECK(tp_rules_only_skip(rules));
    add_any(rules, TP_PARTITION_ROW, false, TP_STYLE_SHARD);
    CHECK(!tp_rules_only_skip(rules));
    tp_rules_free(rules);

    rules = new_rules();
    add_any(rules, TP_PARTITION_SKIP, true, TP_STYLE_SHARD);
    CHECK(!tp_rules_only_skip(rules));
    tp_rules_free(rules);

    rules = new_rules();
    add_any(rules, TP_PARTITION_SKIP, false, TP_STYLE_EXPERTS);
    CHECK(!tp_rules_only_skip(rules));
    tp_rules_free(rules);
}

int
main(void)
{
    RUN(test_every_source_has_its_name);
    RUN(test_rules_that_match_come_in_their_order);
    RUN(test_the_count_goes_on_where_the_room_ends);
    RUN(test_any_pattern_of_a_rule_is_enough_and_counts_once);
    RUN(test_a_pattern_is_tried_on_the_module_when_the_parameter_fails);
    RUN(test_model_types_compare_without_case_and_need_a_model_type);
    RUN(test_a_preset_adds_its_rows_with_labels);
    RUN(test_an_unknown_preset_or_style_adds_nothing);
    RUN(test_a_transformers_rule_matches_parameter_or_module_with_the_prefix);
    RUN(test_a_pattern_that_fails_to_match_ends_the_search_with_its_error);
    RUN(test_a_pattern_that_fails_on_the_module_ends_the_search_as_well);
    RUN(test_rules_only_skip_where_none_shards_sums_or_speaks_of_a_module);
    return check_result();
}
