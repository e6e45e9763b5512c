/* SPDX-License-Identifier: Apache-2.0 */
#include "plan/chunks.h"

#include "plan_fixture.h"

static tp_spec
column(int dim, tp_shape shape)
{
    return (tp_spec){.partition = TP_PARTITION_COLUMN, .dim = dim, .shape = shape};
}

/* "from>at+length ..." of a weight of 24 x 12 over two ranks; owned ones with a star.
 */
static const char *
chunks_of(tp_spec spec, int rank, int64_t begin, int64_t end)
{
    static char text[256];
    fixture f = fixture_new(2);
    tp_chunk *chunks = NULL;
    int count = 0;
    text[0] = '\0';
    add_matrix(&f, "w", TP_MODULE_LINEAR, 24, 12);
    add_spec(&f, "layer_specs[0]", "w", spec);
    if (make_plan(&f) &&
        CHECK_OK(tp_chunks(f.plan, 0, rank, begin, end, &chunks, &count, &f.err),
                 &f.err))
        for (int i = 0; i < count; i++) {
            const size_t used = strlen(text);
            snprintf(text + used, sizeof(text) - used, "%s%lld>%lld+%lld%s",
                     i > 0 ? " " : "", (long long)chunks[i].from,
                     (long long)chunks[i].at, (long long)chunks[i].length,
                     chunks[i].is_owned ? "*" : "");
        }
    free(chunks);
    fixture_free(&f);
    return text;
}

static void
test_a_plain_shard_is_one_chunk(void)
{
    CHECK_TEXT_EQ(chunks_of(column(-1, (tp_shape){0}), 1, 0, 12), "0>12+12*");
    CHECK_TEXT_EQ(chunks_of(column(-1, (tp_shape){0}), 1, 5, 7), "5>17+2*");
    CHECK_TEXT_EQ(chunks_of(column(-1, (tp_shape){0}), 1, 5, 5), "");
}

static void
test_each_piece_of_a_fused_weight_is_a_chunk(void)
{
    const tp_spec fused = column(0, (tp_shape){2, {2, -1}, 0, {0}});
    CHECK_TEXT_EQ(chunks_of(fused, 0, 0, 12), "0>0+6* 6>12+6*");
    CHECK_TEXT_EQ(chunks_of(fused, 1, 4, 8), "4>10+2* 6>18+2*");
}

static void
test_blocks_and_elements_of_several_rows_are_counted_in_rows(void)
{
    CHECK_TEXT_EQ(chunks_of(column(1, (tp_shape){3, {2, 12, -1}, 0, {0}}), 1, 0, 12),
                  "0>6+6* 6>18+6*");
    CHECK_TEXT_EQ(chunks_of(column(0, (tp_shape){3, {8, 3, -1}, 0, {0}}), 1, 1, 12),
                  "1>13+11*");
}

static void
test_bounds_outside_of_the_shard_and_replicated_weights_are_refused(void)
{
    tp_chunk *chunks = NULL;
    int count = 0;
    fixture f = fixture_new(2);
    add_matrix(&f, "w", TP_MODULE_LINEAR, 24, 12);
    add_matrix(&f, "v", TP_MODULE_OTHER, 24, 12);
    add_spec(&f, "layer_specs[0]", "w", column(-1, (tp_shape){0}));
    if (make_plan(&f)) {
        CHECK_FAILS(tp_chunks(f.plan, 0, 0, -1, 2, &chunks, &count, &f.err), TP_VALUE,
                    &f.err, "w.weight: from -1 to 2, expected bounds in 0 to 12");
        CHECK_FAILS(tp_chunks(f.plan, 1, 0, 0, 2, &chunks, &count, &f.err), TP_VALUE,
                    &f.err, "v.weight is replicated, expected a sharded parameter");
    }
    fixture_free(&f);
}

static void
test_bounds_outside_of_a_shard_are_refused(void)
{
    static const int64_t bounds[][2] = {{-1, 4}, {5, 4}, {0, 13}};
    fixture f = fixture_new(2);
    tp_chunk *chunks = NULL;
    int count = 0;
    add_matrix(&f, "w", TP_MODULE_LINEAR, 24, 12);
    add_spec(&f, "layer_specs[0]", "w", column(-1, (tp_shape){0}));
    if (make_plan(&f))
        for (int i = 0; i < 3; i++)
            CHECK_FAILS(tp_chunks(f.plan, 0, 0, bounds[i][0], bounds[i][1], &chunks,
                                  &count, &f.err),
                        TP_VALUE, &f.err, "expected bounds in 0 to 12");
    CHECK(chunks == NULL);
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_a_plain_shard_is_one_chunk);
    RUN(test_each_piece_of_a_fused_weight_is_a_chunk);
    RUN(test_blocks_and_elements_of_several_rows_are_counted_in_rows);
    RUN(test_bounds_outside_of_the_shard_and_replicated_weights_are_refused);
    RUN(test_bounds_outside_of_a_shard_are_refused);
    return check_result();
}
