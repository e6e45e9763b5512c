/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

static const tp_spec column = {.partition = TP_PARTITION_COLUMN, .dim = -1};
static const tp_spec row = {.partition = TP_PARTITION_ROW, .dim = -1};

/* A fixture with one weight "w" of 24 x 12 and a rule for it, two ranks. */
static fixture
one_weight(tp_module_kind kind, tp_spec spec)
{
    fixture f = fixture_new(2);
    add_matrix(&f, "w", kind, 24, 12);
    add_spec(&f, "layer_specs[0]", "w", spec);
    return f;
}

static tp_spec
shaped(tp_partition partition, int dim, tp_shape shape)
{
    return (tp_spec){.partition = partition, .dim = dim, .shape = shape};
}

static void
check_local(tp_module_kind kind, tp_spec spec, const char *local, int dim)
{
    fixture f = one_weight(kind, spec);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "w.weight", 1), local);
        CHECK_INT_EQ(entry_of(&f, "w.weight")->dim, dim);
    }
    fixture_free(&f);
}

static void
test_each_kind_of_module_is_sharded_along_the_dimension_its_weight_has(void)
{
    check_local(TP_MODULE_LINEAR, column, "column [12, 12]", 0);
    check_local(TP_MODULE_LINEAR, row, "row [24, 6]", 1);
    check_local(TP_MODULE_CONV1D, column, "column [24, 6]", 1);
    check_local(TP_MODULE_CONV1D, row, "row [12, 12]", 0);
    check_local(TP_MODULE_EMBEDDING, column, "hidden [24, 6]", 1);
    check_local(TP_MODULE_EMBEDDING, row, "vocabulary [12, 12]", 0);
}

static void
test_an_explicit_dimension_decides_over_an_embedding(void)
{
    tp_spec spec = column;
    spec.dim = 0;
    check_local(TP_MODULE_EMBEDDING, spec, "vocabulary [12, 12]", 0);
    spec = row;
    spec.dim = 1;
    check_local(TP_MODULE_EMBEDDING, spec, "hidden [24, 6]", 1);
}

static void
test_an_explicit_dimension_against_the_partition_of_a_linear_is_refused(void)
{
    tp_spec spec = column;
    spec.dim = 1;
    fixture f = one_weight(TP_MODULE_LINEAR, spec);
    CHECK_REFUSED(&f, "partition_dim 1 does not go with partition_type 'column'");
}

static void
test_equal_pieces_are_each_sharded(void)
{
    fixture f = one_weight(TP_MODULE_LINEAR, shaped(TP_PARTITION_COLUMN, 0,
                                                    (tp_shape){2, {2, -1}, 0, {0}}));
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "w.weight", 0), "0+6 12+6");
        CHECK_TEXT_EQ(runs_of(&f, "w.weight", 1), "6+6 18+6");
    }
    fixture_free(&f);
}

static void
test_listed_pieces_are_each_sharded(void)
{
    fixture f = one_weight(
        TP_MODULE_LINEAR,
        shaped(TP_PARTITION_COLUMN, -1, (tp_shape){2, {0, 12}, 3, {16, 4, 4}}));
    if (make_plan(&f))
        CHECK_TEXT_EQ(runs_of(&f, "w.weight", 1), "8+8 18+2 22+2");
    fixture_free(&f);
}

static void
test_pieces_along_the_input_of_a_row_are_each_sharded(void)
{
    fixture f = one_weight(TP_MODULE_LINEAR,
                           shaped(TP_PARTITION_ROW, 1, (tp_shape){2, {-1, 3}, 0, {0}}));
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "w.weight", 0), "0+2 4+2 8+2");
        CHECK_TEXT_EQ(local_of(&f, "w.weight", 0), "row [24, 6]");
        CHECK_INT_EQ(entry_of(&f, "w.weight")->outer, 24);
    }
    fixture_free(&f);
}

static void
test_pieces_that_do_not_fit_are_refused_with_all_sizes(void)
{
    fixture f =
        one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_COLUMN, -1, (tp_shape){2, {0, -1}, 2, {16, 4}}));
    CHECK_REFUSED(&f,
                  "16 + 4 of shape are 20 in all, but the sharded dimension has 24");
    f = one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_COLUMN, -1, (tp_shape){2, {5, -1}, 0, {0}}));
    CHECK_REFUSED(&f, "5 equal pieces, which do not divide size 24");
    f = one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_COLUMN, -1, (tp_shape){2, {2, 13}, 0, {0}}));
    CHECK_REFUSED(&f, "shape[1] is 13, but the weight has 12 there");
    f = one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_COLUMN, -1, (tp_shape){2, {65, -1}, 0, {0}}));
    CHECK_REFUSED(&f, "65 equal pieces");
    f = one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_COLUMN, -1, (tp_shape){1, {2}, 0, {0}}));
    CHECK_REFUSED(&f, "shape has 1 dimensions, but the weight has 2");
    f = one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_COLUMN, 0, (tp_shape){2, {24, -1}, 0, {0}}));
    CHECK_REFUSED(&f, "size 1 cannot be sharded over 2 ranks");
}

static void
test_a_view_of_experts_is_sharded_inside_each_expert(void)
{
    fixture f = fixture_new(2);
    const int weight = add_linear(&f, "w", 24, 12);
    add_vector(&f, weight, "bias", 24);
    add_spec(&f, "r", "w",
             shaped(TP_PARTITION_COLUMN, 1, (tp_shape){3, {3, -1, 12}, 0, {0}}));
    if (make_plan(&f)) {
        const tp_entry *entry = entry_of(&f, "w.weight");
        CHECK_TEXT_EQ(local_of(&f, "w.weight", 1), "column [12, 12]");
        CHECK_TEXT_EQ(runs_of(&f, "w.weight", 1), "4+4");
        CHECK_INT_EQ(entry->outer, 3);
        CHECK_INT_EQ(entry->layout->size, 8);
        CHECK_INT_EQ(entry->inner, 12);
        const tp_entry *bias = entry_of(&f, "w.bias");
        CHECK(bias->layout == entry->layout);
        CHECK_INT_EQ(bias->outer, 3);
        CHECK_INT_EQ(bias->inner, 1);
        CHECK_TEXT_EQ(local_of(&f, "w.bias", 0), "column [12]");
    }
    fixture_free(&f);
}

static void
test_a_view_of_experts_may_list_pieces_and_shard_rows(void)
{
    fixture f = one_weight(
        TP_MODULE_LINEAR,
        shaped(TP_PARTITION_COLUMN, 1, (tp_shape){3, {3, 0, -1}, 2, {6, 2}}));
    if (make_plan(&f))
        CHECK_TEXT_EQ(runs_of(&f, "w.weight", 1), "3+3 7+1");
    fixture_free(&f);
    f = one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_ROW, 2, (tp_shape){3, {3, 8, -1}, 0, {0}}));
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "w.weight", 1), "row [24, 6]");
        CHECK_INT_EQ(entry_of(&f, "w.weight")->outer, 24);
    }
    fixture_free(&f);
}

static void
test_views_that_give_no_matrix_are_refused(void)
{
    fixture f = one_weight(TP_MODULE_LINEAR, shaped(TP_PARTITION_COLUMN, 1,
                                                    (tp_shape){3, {3, -1, 6}, 0, {0}}));
    CHECK_REFUSED(&f, "shape [3, 16, 6] runs across the dimensions");
    f = one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_COLUMN, 1, (tp_shape){3, {7, -1, 12}, 0, {0}}));
    CHECK_REFUSED(&f, "288 elements cannot be seen as [7, -1, 12]");
    f = one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_COLUMN, 1, (tp_shape){3, {-1, -1, 12}, 0, {0}}));
    CHECK_REFUSED(&f, "shape[0] and shape[1] are both -1");
    f = one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_ROW, 1, (tp_shape){3, {3, 8, 12}, 0, {0}}));
    CHECK_REFUSED(&f, "a part of dimension 0 of the weight, but partition_type 'row'");
    f = one_weight(TP_MODULE_LINEAR,
                   shaped(TP_PARTITION_COLUMN, -1, (tp_shape){3, {3, 8, 12}, 0, {0}}));
    CHECK_REFUSED(&f, "partition_dim has to say");
}

static void
test_the_bias_of_a_conv1d_is_sharded_like_its_columns(void)
{
    fixture f = fixture_new(2);
    const int weight = add_matrix(&f, "w", TP_MODULE_CONV1D, 12, 24);
    add_vector(&f, weight, "bias", 24);
    add_spec(&f, "r", "w",
             shaped(TP_PARTITION_COLUMN, 1, (tp_shape){2, {-1, 3}, 0, {0}}));
    if (make_plan(&f)) {
        const tp_entry *bias = entry_of(&f, "w.bias");
        CHECK_TEXT_EQ(runs_of(&f, "w.weight", 1), "4+4 12+4 20+4");
        CHECK_TEXT_EQ(runs_of(&f, "w.bias", 1), "4+4 12+4 20+4");
        CHECK_INT_EQ(entry_of(&f, "w.weight")->outer, 12);
        CHECK_INT_EQ(bias->outer * bias->inner, 1);
    }
    fixture_free(&f);
}

static void
test_the_bias_of_a_row_stays_replicated(void)
{
    fixture f = fixture_new(2);
    const int weight = add_linear(&f, "w", 24, 12);
    add_vector(&f, weight, "bias", 24);
    add_spec(&f, "r", "w", row);
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "w.bias")->kind, TP_REPLICATED);
        CHECK_INT_EQ(layer_of(&f, "w")->bias, 1);
    }
    fixture_free(&f);
}

static void
test_a_bias_of_another_size_is_refused(void)
{
    fixture f = fixture_new(2);
    const int weight = add_linear(&f, "w", 24, 12);
    add_vector(&f, weight, "bias", 12);
    add_spec(&f, "r", "w", column);
    CHECK_REFUSED(&f, "'w.bias' [12]");
}

static void
test_what_is_no_matrix_of_a_layer_is_refused(void)
{
    fixture f = fixture_new(2);
    const int module = add_module(&f, "norm", TP_MODULE_OTHER, 0);
    add_shaped(&f, module, "weight", 1, (int64_t[]){16}, -1);
    add_spec(&f, "r", "norm", column);
    CHECK_REFUSED(&f, "it is not a linear or embedding weight: narrow the pattern");
    f = fixture_new(2);
    const int deep = add_module(&f, "w", TP_MODULE_LINEAR, 0);
    add_shaped(&f, deep, "weight", 3, (int64_t[]){4, 4, 4}, -1);
    add_spec(&f, "r", "w", column);
    CHECK_REFUSED(&f, "has 2 dimensions, this one has 3");
    f = fixture_new(2);
    add_linear(&f, "w", 24, 0);
    add_spec(&f, "r", "w", column);
    CHECK_REFUSED(&f, "the weight is empty");
}

static void
test_what_a_parametrization_computes_a_weight_from_is_refused(void)
{
    fixture f = fixture_new(2);
    const tp_module list = {.name = "w.parametrizations.weight",
                            .class_name = "ParametrizationList",
                            .kind = TP_MODULE_OTHER};
    int module = -1;
    CHECK_OK(tp_model_add_module(f.model, &list, &module, &f.err), &f.err);
    add_shaped(&f, module, "original0", 2, (int64_t[]){16, 1}, -1);
    add_shaped(&f, module, "original1", 2, (int64_t[]){16, 8}, -1);
    add_spec(&f, "r", ".*original0", column);
    CHECK_REFUSED(&f, "a parametrization of torch.nn.utils computes a weight from it");
    f = fixture_new(2);
    module = add_module(&f, "w", TP_MODULE_LINEAR, 0);
    add_shaped(&f, module, "weight_g", 2, (int64_t[]){16, 1}, -1);
    add_shaped(&f, module, "weight_v", 2, (int64_t[]){16, 8}, -1);
    add_spec(&f, "r", ".*weight_g", column);
    CHECK_REFUSED(&f, "a parametrization of torch.nn.utils computes a weight from it");
}

int
main(void)
{
    RUN(test_each_kind_of_module_is_sharded_along_the_dimension_its_weight_has);
    RUN(test_an_explicit_dimension_decides_over_an_embedding);
    RUN(test_an_explicit_dimension_against_the_partition_of_a_linear_is_refused);
    RUN(test_equal_pieces_are_each_sharded);
    RUN(test_listed_pieces_are_each_sharded);
    RUN(test_pieces_along_the_input_of_a_row_are_each_sharded);
    RUN(test_pieces_that_do_not_fit_are_refused_with_all_sizes);
    RUN(test_a_view_of_experts_is_sharded_inside_each_expert);
    RUN(test_a_view_of_experts_may_list_pieces_and_shard_rows);
    RUN(test_views_that_give_no_matrix_are_refused);
    RUN(test_the_bias_of_a_conv1d_is_sharded_like_its_columns);
    RUN(test_the_bias_of_a_row_stays_replicated);
    RUN(test_a_bias_of_another_size_is_refused);
    RUN(test_what_is_no_matrix_of_a_layer_is_refused);
    RUN(test_what_a_parametrization_computes_a_weight_from_is_refused);
    return check_result();
}
