/* SPDX-License-Identifier: Apache-2.0 */
#include "plan/blocks.h"

#include "plan_fixture.h"

static tp_spec
shard(tp_partition partition, tp_shape shape)
{
    return (tp_spec){.partition = partition, .dim = -1, .shape = shape};
}

/* "outer x size: start+length ..." in blocks of a weight of 24 x 12 over two ranks, or
 * what is said. */
static const char *
blocks_of(tp_spec spec, int rank, int64_t block)
{
    static char text[256];
    fixture f = fixture_new(2);
    tp_blocks blocks = {0};
    text[0] = '\0';
    add_matrix(&f, "w", TP_MODULE_LINEAR, 24, 12);
    add_spec(&f, "layer_specs[0]", "w", spec);
    if (make_plan(&f) && tp_blocks_of(f.plan, 0, rank, block, &blocks, &f.err) < 0)
        snprintf(text, sizeof(text), "%s", tp_error_text(&f.err));
    else
        snprintf(text, sizeof(text), "%lld x %lld:", (long long)blocks.outer,
                 (long long)blocks.size);
    for (int i = 0; i < blocks.count; i++) {
        const size_t used = strlen(text);
        snprintf(text + used, sizeof(text) - used, " %lld+%lld",
                 (long long)blocks.runs[i].start, (long long)blocks.runs[i].length);
    }
    free(blocks.runs);
    fixture_free(&f);
    return text;
}

static void
test_rows_are_blocks_that_follow_one_another(void)
{
    const tp_spec rows = shard(TP_PARTITION_COLUMN, (tp_shape){0});
    CHECK_TEXT_EQ(blocks_of(rows, 0, 4), "1 x 72: 0+36");
    CHECK_TEXT_EQ(blocks_of(rows, 1, 4), "1 x 72: 36+36");
    /* Twelve rows of twelve are whole blocks of 16, although a row is none. */
    CHECK_TEXT_EQ(blocks_of(rows, 1, 16), "1 x 18: 9+9");
}

static void
test_columns_are_blocks_of_each_row(void)
{
    const tp_spec columns = shard(TP_PARTITION_ROW, (tp_shape){0});
    CHECK_TEXT_EQ(blocks_of(columns, 1, 2), "24 x 6: 3+3");
    CHECK_TEXT_EQ(blocks_of(columns, 1, 6), "24 x 2: 1+1");
}

static void
test_each_piece_of_a_fused_weight_is_a_run(void)
{
    const tp_spec fused = shard(TP_PARTITION_COLUMN, (tp_shape){2, {2, -1}, 0, {0}});
    CHECK_TEXT_EQ(blocks_of(fused, 0, 8), "1 x 36: 0+9 18+9");
    CHECK_TEXT_EQ(blocks_of(fused, 1, 8), "1 x 36: 9+9 27+9");
}

static void
test_what_splits_a_block_is_refused(void)
{
    CHECK_TEXT_EQ(blocks_of(shard(TP_PARTITION_ROW, (tp_shape){0}), 1, 4),
                  "w.weight: rank 1 would hold 6 elements from 6 on out of each 12, "
                  "expected whole blocks of 4 elements");
    CHECK_TEXT_EQ(blocks_of(shard(TP_PARTITION_ROW, (tp_shape){0}), 0, 0),
                  "block: got 0, expected a positive size");
}

static void
test_a_replicated_weight_has_no_shard(void)
{
    tp_blocks blocks = {0};
    fixture f = fixture_new(2);
    add_matrix(&f, "w", TP_MODULE_LINEAR, 24, 12);
    add_matrix(&f, "v", TP_MODULE_OTHER, 24, 12);
    add_spec(&f, "layer_specs[0]", "w", shard(TP_PARTITION_COLUMN, (tp_shape){0}));
    if (make_plan(&f))
        CHECK_FAILS(tp_blocks_of(f.plan, 1, 0, 4, &blocks, &f.err), TP_VALUE, &f.err,
                    "v.weight is replicated, expected a sharded parameter");
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_rows_are_blocks_that_follow_one_another);
    RUN(test_columns_are_blocks_of_each_row);
    RUN(test_each_piece_of_a_fused_weight_is_a_run);
    RUN(test_what_splits_a_block_is_refused);
    RUN(test_a_replicated_weight_has_no_shard);
    return check_result();
}
