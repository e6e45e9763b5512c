/* SPDX-License-Identifier: Apache-2.0 */
#include "rules/spec.h"

#include "check.h"

#define WHERE "layer_specs[2]"

static void
check_accepted(const tp_spec *spec)
{
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_spec_check(spec, WHERE, &err), &err);
}

/* The message begins with the place and says `part`. */
static void
check_refused(const tp_spec *spec, const char *part)
{
    tp_error err = TP_NO_ERROR;
    const int result = tp_spec_check(spec, WHERE, &err);
    CHECK(strncmp(tp_error_text(&err), WHERE ": ", sizeof(WHERE ": ") - 1) == 0);
    CHECK_FAILS(result, TP_VALUE, &err, part);
}

static void
test_every_partition_type_is_read_in_any_case_and_written_back(void)
{
    tp_error err = TP_NO_ERROR;
    const char *const given[] = {"column", "Row", "SKIP"};
    const char *const named[] = {"column", "row", "skip"};
    for (int i = 0; i < 3; i++) {
        tp_partition partition = TP_PARTITION_COLUMN;
        CHECK_OK(tp_partition_parse(given[i], WHERE, &partition, &err), &err);
        CHECK_TEXT_EQ(tp_partition_name(partition), named[i]);
    }
}

static void
test_an_unknown_partition_type_names_the_place_and_the_nearest(void)
{
    tp_error err = TP_NO_ERROR;
    tp_partition partition = TP_PARTITION_ROW;
    CHECK_FAILS(
        tp_partition_parse("colum", WHERE, &partition, &err), TP_VALUE, &err,
        "layer_specs[2]: unknown partition type 'colum'; did you mean 'column'?");
    CHECK_FAILS(tp_partition_parse("replicated", WHERE, &partition, &err), TP_VALUE,
                &err, "known: column, row, skip");
    CHECK_INT_EQ(partition, TP_PARTITION_ROW);
}

static void
test_the_spec_without_wishes_is_accepted(void)
{
    const tp_spec spec = TP_NO_SPEC;
    check_accepted(&spec);
}

static void
test_documented_shapes_are_accepted(void)
{
    const tp_spec specs[] = {
        {.dim = -1, .shape = {.dims = 2, .sizes = {2, -1}}},
        {.dim = 0,
         .shape = {.dims = 2, .sizes = {0, -1}, .pieces = 3, .piece = {64, 16, 16}}},
        {.dim = 1, .shape = {.dims = 3, .sizes = {8, -1, 32}}},
        {.partition = TP_PARTITION_ROW,
         .dim = -1,
         .shape = {.dims = 2, .sizes = {-1, 2}}},
        {.partition = TP_PARTITION_ROW,
         .dim = -1,
         .shape = {.dims = 2, .sizes = {-1, 0}, .pieces = 1, .piece = {4}}},
    };
    for (size_t i = 0; i < sizeof(specs) / sizeof(specs[0]); i++)
        check_accepted(&specs[i]);
}

static void
test_each_flag_is_accepted_with_its_partition_type_and_refused_with_the_others(void)
{
    const char *const messages[] = {
        "gather_output needs partition_type 'column'",
        "split_input needs partition_type 'row'",
        "grad_allreduce needs partition_type 'skip'",
    };
    for (int flag = 0; flag < 3; flag++) {
        for (int partition = TP_PARTITION_COLUMN; partition <= TP_PARTITION_SKIP;
             partition++) {
            const tp_spec spec = {.partition = (tp_partition)partition,
                                  .dim = -1,
                                  .gather_output = flag == 0,
                                  .split_input = flag == 1,
                                  .sum_gradient = flag == 2};
            if (flag == partition)
                check_accepted(&spec);
            else
                check_refused(&spec, messages[flag]);
        }
    }
}

static void
test_a_skip_with_a_place_to_shard_is_refused(void)
{
    const tp_spec dim = {.partition = TP_PARTITION_SKIP, .dim = 0};
    check_refused(&dim, "so partition_dim has no effect");
    const tp_spec shape = {.partition = TP_PARTITION_SKIP,
                           .dim = -1,
                           .shape = {.dims = 2, .sizes = {2, -1}}};
    check_refused(&shape, "so shape has no effect");
}

static void
test_a_dim_outside_the_shape_is_refused(void)
{
    const tp_spec high = {.dim = 2, .shape = {.dims = 2, .sizes = {2, -1}}};
    check_refused(&high,
                  "partition_dim is 2, but shape has 2 dimensions, so it must be "
                  "between 0 and 1");
    const tp_spec row = {
        .partition = TP_PARTITION_ROW, .dim = -1, .shape = {.dims = 1, .sizes = {-1}}};
    check_refused(&row, "partition_dim is 1, but shape has 1 dimension, so");
    const tp_spec negative = {.dim = -2};
    check_refused(&negative, "partition_dim is -2, but it must be between 0 and 7");
    const tp_spec far = {.dim = TP_MAX_DIMS};
    check_refused(&far, "partition_dim is 8, but it must be between 0 and 7");
    const tp_spec last = {.dim = TP_MAX_DIMS - 1};
    check_accepted(&last);
}

static void
test_a_shape_with_too_many_dimensions_is_refused(void)
{
    const tp_spec spec = {.dim = 0, .shape = {.dims = TP_MAX_DIMS + 1}};
    check_refused(&spec, "shape has 9 dimensions, but at most 8 are supported");
}

static void
test_sizes_must_be_positive_or_inferred(void)
{
    const tp_spec zero = {.dim = -1, .shape = {.dims = 2, .sizes = {0, -1}}};
    check_refused(&zero, "shape[0] is 0, but a size must be positive, or -1");
    const tp_spec negative = {.dim = -1, .shape = {.dims = 2, .sizes = {2, -3}}};
    check_refused(&negative, "shape[1] is -3, but a size must be positive, or -1");
}

static void
test_a_list_of_pieces_stands_at_the_sharded_dimension_only(void)
{
    const tp_spec spec = {
        .dim = 0, .shape = {.dims = 2, .sizes = {-1, 0}, .pieces = 2, .piece = {8, 8}}};
    check_refused(
        &spec,
        "shape[1] is a list of pieces, but the weight is sharded along dimension 0");
    const tp_spec alone = {.dim = 0, .shape = {.pieces = 2, .piece = {8, 8}}};
    check_refused(&alone, "pieces are listed, but not in shape");
    const tp_spec unmarked = {
        .dim = 0,
        .shape = {.dims = 2, .sizes = {16, -1}, .pieces = 2, .piece = {8, 8}}};
    check_refused(&unmarked, "pieces are listed, but not in shape");
}

static void
test_pieces_must_be_positive_few_and_not_overflow(void)
{
    tp_spec spec = {
        .dim = 0, .shape = {.dims = 2, .sizes = {0, -1}, .pieces = 3, .piece = {8, 8}}};
    check_refused(&spec, "shape[0][2] is 0, but the size of a piece must be positive");
    spec.shape.piece[2] = -1;
    check_refused(&spec, "shape[0][2] is -1");
    spec.shape.piece[2] = INT64_MAX;
    check_refused(&spec,
                  "the pieces of shape[0] add up to more than a weight can hold");
    spec.shape.pieces = TP_MAX_PIECES + 1;
    check_refused(&spec, "shape[0] lists 65 pieces, but at most 64 are supported");
}

int
main(void)
{
    RUN(test_every_partition_type_is_read_in_any_case_and_written_back);
    RUN(test_an_unknown_partition_type_names_the_place_and_the_nearest);
    RUN(test_the_spec_without_wishes_is_accepted);
    RUN(test_documented_shapes_are_accepted);
    RUN(test_each_flag_is_accepted_with_its_partition_type_and_refused_with_the_others);
    RUN(test_a_skip_with_a_place_to_shard_is_refused);
    RUN(test_a_dim_outside_the_shape_is_refused);
    RUN(test_a_shape_with_too_many_dimensions_is_refused);
    RUN(test_sizes_must_be_positive_or_inferred);
    RUN(test_a_list_of_pieces_stands_at_the_sharded_dimension_only);
    RUN(test_pieces_must_be_positive_few_and_not_overflow);
    return check_result();
}
