/* SPDX-License-Identifier: Apache-2.0 */
#include "rules/hf_tp_plan.h"

#include "check.h"

#define PATTERN "layers.*.mlp.up_proj"

static tp_spec
spec_of(const char *style)
{
    tp_error err = TP_NO_ERROR;
    tp_spec spec = TP_NO_SPEC;
    CHECK_OK(tp_hf_plan_spec(style, PATTERN, &spec, &err), &err);
    return spec;
}

static void
test_plain_styles_name_a_partition_and_nothing_else(void)
{
    const struct {
        const char *style;
        tp_partition partition;
    } rows[] = {
        {"colwise", TP_PARTITION_COLUMN},
        {"rowwise", TP_PARTITION_ROW},
        {"embedding_rowwise", TP_PARTITION_ROW},
        {"embedding_colwise", TP_PARTITION_COLUMN},
        {"replicate", TP_PARTITION_SKIP},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        const tp_spec spec = spec_of(rows[i].style);
        CHECK_INT_EQ(spec.partition, rows[i].partition);
        CHECK_INT_EQ(spec.dim, -1);
        CHECK_INT_EQ(spec.shape.dims, 0);
        CHECK(!spec.gather_output && !spec.split_input && !spec.sum_gradient);
    }
}

static void
test_old_and_new_names_of_a_style_mean_the_same(void)
{
    const char *const gather[] = {"colwise_gather_output", "colwise_rep"};
    const char *const split[] = {"rowwise_split_input", "rowwise_rep"};
    for (int i = 0; i < 2; i++) {
        const tp_spec column = spec_of(gather[i]);
        CHECK(column.partition == TP_PARTITION_COLUMN && column.gather_output &&
              !column.split_input);
        const tp_spec row = spec_of(split[i]);
        CHECK(row.partition == TP_PARTITION_ROW && row.split_input &&
              !row.gather_output);
    }
}

static void
test_packed_styles_are_two_equal_pieces_along_the_sharded_dimension(void)
{
    const tp_spec column = spec_of("packed_colwise");
    CHECK_INT_EQ(column.partition, TP_PARTITION_COLUMN);
    CHECK_INT_EQ(column.shape.dims, 2);
    CHECK_INT_EQ(column.shape.sizes[0], 2);
    CHECK_INT_EQ(column.shape.sizes[1], -1);
    const tp_spec row = spec_of("packed_rowwise");
    CHECK_INT_EQ(row.partition, TP_PARTITION_ROW);
    CHECK_INT_EQ(row.shape.dims, 2);
    CHECK_INT_EQ(row.shape.sizes[0], -1);
    CHECK_INT_EQ(row.shape.sizes[1], 2);
}

static void
test_a_replicated_gradient_style_sums_the_gradient(void)
{
    const tp_spec spec = spec_of("replicated_with_grad_allreduce");
    CHECK(spec.partition == TP_PARTITION_SKIP && spec.sum_gradient);
}

static void
test_every_style_that_is_built_passes_the_check_of_specs(void)
{
    const char *const styles[] = {
        "colwise",
        "colwise_gather_output",
        "colwise_rep",
        "rowwise",
        "rowwise_split_input",
        "rowwise_rep",
        "embedding_rowwise",
        "embedding_colwise",
        "packed_colwise",
        "packed_rowwise",
        "replicate",
        "replicated_with_grad_allreduce",
    };
    tp_error err = TP_NO_ERROR;
    for (size_t i = 0; i < sizeof(styles) / sizeof(styles[0]); i++) {
        const tp_spec spec = spec_of(styles[i]);
        CHECK_OK(tp_spec_check(&spec, styles[i], &err), &err);
    }
}

static void
test_the_case_of_a_style_does_not_count(void)
{
    CHECK(spec_of("ColWise_Rep").gather_output);
}

static void
test_a_style_that_shards_no_weight_is_known_and_has_no_specification(void)
{
    static const struct {
        const char *name;
        tp_style style;
    } rows[] = {
        {"moe_tp_experts", TP_STYLE_EXPERTS},    {"MLA_kv_a_proj", TP_STYLE_ROPE},
        {"local_params", TP_STYLE_NOTHING},      {"local", TP_STYLE_NOTHING},
        {"moe_identity_expert", TP_STYLE_SHARE}, {"all_reduce", TP_STYLE_EXPERTS},
        {"sequence_parallel", TP_STYLE_UNKNOWN}, {"gather", TP_STYLE_UNKNOWN},
        {"local_colwise", TP_STYLE_UNKNOWN},     {"local_rowwise", TP_STYLE_UNKNOWN},
        {"grouped_gemm", TP_STYLE_UNKNOWN},      {"ep_router", TP_STYLE_UNKNOWN},
    };
    tp_error err = TP_NO_ERROR;
    tp_spec spec = TP_NO_SPEC;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        tp_style style = TP_STYLE_SHARD;
        CHECK_OK(tp_hf_plan_style(rows[i].name, PATTERN, &style, &spec, &err), &err);
        CHECK_INT_EQ(style, rows[i].style);
        const int result = tp_hf_plan_spec(rows[i].name, PATTERN, &spec, &err);
        CHECK_TEXT_HAS(tp_error_text(&err), rows[i].name);
        CHECK_TEXT_HAS(tp_error_text(&err), "tp_plan['" PATTERN "']");
        CHECK_FAILS(result, TP_VALUE, &err, "shards no weight");
    }
}

static void
test_the_table_has_the_names_of_styles_and_an_end(void)
{
    bool found = false;
    int count = 0;
    for (; tp_hf_plan_style_name(count) != NULL; count++)
        found = found || strcmp(tp_hf_plan_style_name(count), "colwise") == 0;
    CHECK(found && count > 1);
    CHECK(tp_hf_plan_style_name(-1) == NULL);
}

static void
test_an_unknown_style_names_pattern_style_and_the_nearest(void)
{
    tp_error err = TP_NO_ERROR;
    tp_spec spec = TP_NO_SPEC;
    const int result = tp_hf_plan_spec("colwize", PATTERN, &spec, &err);
    CHECK_TEXT_HAS(tp_error_text(&err),
                   "tp_plan['" PATTERN "']: unknown style 'colwize'");
    CHECK_FAILS(result, TP_VALUE, &err, "did you mean 'colwise'");
}

static bool
matches(const char *pattern, const char *prefix, const char *name)
{
    return tp_hf_plan_match(pattern, prefix, name, TP_STARS_INDICES);
}

static bool
globs(const char *pattern, const char *prefix, const char *name)
{
    return tp_hf_plan_match(pattern, prefix, name, TP_STARS_TEXT);
}

static void
test_a_star_takes_exactly_one_index_between_dots(void)
{
    CHECK(matches("layers.*.mlp", "", "layers.0.mlp"));
    CHECK(matches("layers.*.mlp", "", "layers.1234567890123.mlp"));
    CHECK(matches("*.mlp", "", "3.mlp"));
    CHECK(matches("experts.*", "", "experts.7"));
    CHECK(matches("layers.*.experts.*.w1", "", "layers.1.experts.22.w1"));
    CHECK(!matches("layers.*.mlp", "", "layers.mlp"));
    CHECK(!matches("layers.*.mlp", "", "layers..mlp"));
    CHECK(!matches("layers.*.mlp", "", "layers.a.mlp"));
    CHECK(!matches("layers.*.mlp", "", "layers.0a.mlp"));
    CHECK(!matches("layers.*.mlp", "", "layers.0.1.mlp"));
    CHECK(!matches("layers.*.mlp", "", "layers.-1.mlp"));
    CHECK(!matches("experts.*", "", "experts."));
    CHECK(!matches("experts.*", "", "experts.7.w1"));
}

static void
test_a_star_inside_a_part_is_only_a_star(void)
{
    CHECK(!matches("w*.weight", "", "w1.weight"));
    CHECK(!matches("*x.weight", "", "1x.weight"));
    CHECK(matches("w*.weight", "", "w*.weight"));
}

static void
test_a_name_matches_whole_and_case_counts(void)
{
    CHECK(matches("lm_head", "", "lm_head"));
    CHECK(!matches("lm_head", "", "lm_head.weight"));
    CHECK(!matches("lm_head", "", "my_lm_head"));
    CHECK(!matches("lm_head.weight", "", "lm_head"));
    CHECK(!matches("lm_head", "", "LM_head"));
    CHECK(!matches("a.b", "", "a_b"));
}

static void
test_the_base_model_prefix_may_stand_on_either_side(void)
{
    CHECK(matches("layers.*.mlp", "model", "model.layers.0.mlp"));
    CHECK(matches("layers.*.mlp", "model", "layers.0.mlp"));
    CHECK(matches("model.layers.*.mlp", "model", "layers.0.mlp"));
    CHECK(matches("model.layers.*.mlp", "model", "model.layers.0.mlp"));
    CHECK(matches("layers.*.mlp", "model.text", "model.text.layers.0.mlp"));
    CHECK(!matches("layers.*.mlp", "model", "other.layers.0.mlp"));
    CHECK(!matches("layers.*.mlp", "", "model.layers.0.mlp"));
    CHECK(!matches("layers.*.mlp", "model", "modellayers.0.mlp"));
    CHECK(!matches("layers.*.mlp", "model", "models.layers.0.mlp"));
    CHECK(!matches("layers.*.mlp", "model", "model_layers.0.mlp"));
    CHECK(!matches("layers.*.mlp", "model", "model.model.layers.0.mlp"));
    CHECK(!matches("", "model", "model"));
}

static void
test_a_star_that_takes_any_text_takes_dots_too(void)
{
    CHECK(globs("*.q_proj", "", "layers.0.attn.q_proj"));
    CHECK(globs("*.q_proj", "", "q.q_proj"));
    CHECK(globs("layers.*.q_proj", "", "layers.0.attn.q_proj"));
    CHECK(globs("layers.*.q_proj", "model", "model.layers.0.attn.q_proj"));
    CHECK(globs("model.layers.*.q_proj", "model", "layers.0.attn.q_proj"));
    CHECK(globs("*.a.*.w", "", "x.a.a.b.w"));
    CHECK(globs("w*", "", "w") && globs("w*", "", "w.1") && globs("**", "", ""));
    CHECK(!globs("*.q_proj", "", "q_proj"));
    CHECK(!globs("*.q_proj", "", "layers.0.xq_proj"));
    CHECK(!globs("*.q_proj", "", "layers.0.q_proj.weight"));
    CHECK(!globs("layers.*.q_proj", "", "model.layers.0.q_proj"));
    CHECK(!globs("*.a.*.w", "", "x.a.w"));
    CHECK(!globs("q_proj", "", "layers.0.q_proj"));
}

int
main(void)
{
    RUN(test_plain_styles_name_a_partition_and_nothing_else);
    RUN(test_old_and_new_names_of_a_style_mean_the_same);
    RUN(test_packed_styles_are_two_equal_pieces_along_the_sharded_dimension);
    RUN(test_a_replicated_gradient_style_sums_the_gradient);
    RUN(test_every_style_that_is_built_passes_the_check_of_specs);
    RUN(test_the_case_of_a_style_does_not_count);
    RUN(test_a_style_that_shards_no_weight_is_known_and_has_no_specification);
    RUN(test_the_table_has_the_names_of_styles_and_an_end);
    RUN(test_an_unknown_style_names_pattern_style_and_the_nearest);
    RUN(test_a_star_takes_exactly_one_index_between_dots);
    RUN(test_a_star_inside_a_part_is_only_a_star);
    RUN(test_a_name_matches_whole_and_case_counts);
    RUN(test_the_base_model_prefix_may_stand_on_either_side);
    RUN(test_a_star_that_takes_any_text_takes_dots_too);
    return check_result();
}
