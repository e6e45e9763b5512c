/* SPDX-License-Identifier: Apache-2.0 */
#include "reads/read_plan.h"

#include "check.h"

/* Bytes `from` to `end` of a file, at `out`. */
static tp_box
stretch(int file, int64_t from, int64_t end)
{
    return (tp_box){file, 1, from, 1, {end - from}, {0}, {end - from}, 0, {1}};
}

static void
test_slices_are_read_in_the_order_of_the_files(void)
{
    tp_error err = TP_NO_ERROR;
    tp_read_plan plan = TP_NO_READ_PLAN;
    const tp_box boxes[] = {stretch(1, 0, 10), stretch(0, 50, 60), stretch(0, 20, 50),
                            stretch(0, 20, 20), stretch(0, 90, 95)};
    CHECK_OK((tp_read_plan_clear(&plan), tp_read_plan_make(boxes, 5, 0, &plan, &err)),
             &err);
    CHECK_INT_EQ(plan.reads.count, 4);
    CHECK_INT_EQ(plan.bytes, 55);
    const int order[] = {2, 1, 4, 0};
    for (int i = 0; i < 4; i++)
        CHECK_INT_EQ(plan.reads.items[i].box, order[i]);
    CHECK_INT_EQ(plan.span_count, 3);
    CHECK_INT_EQ(plan.spans[0].begin, 20);
    CHECK_INT_EQ(plan.spans[0].end, 60);
    CHECK_INT_EQ(plan.spans[1].begin, 90);
    CHECK_INT_EQ(plan.spans[2].file, 1);
    tp_read_plan_clear(&plan);
}

static void
test_spans_join_over_a_gap(void)
{
    tp_error err = TP_NO_ERROR;
    tp_read_plan plan = TP_NO_READ_PLAN;
    /* The second is within the first: rows with something between them. */
    const tp_box rows = {0, 2, 0, 1, {4, 10}, {0, 2}, {4, 3}, 0, {3, 1}};
    const tp_box boxes[] = {rows, stretch(0, 6, 8), stretch(0, 45, 50),
                            stretch(0, 60, 61)};
    CHECK_OK((tp_read_plan_clear(&plan), tp_read_plan_make(boxes, 4, 10, &plan, &err)),
             &err);
    CHECK_INT_EQ(plan.bytes, 12 + 2 + 5 + 1);
    CHECK_INT_EQ(plan.span_count, 1);
    CHECK_INT_EQ(plan.spans[0].begin, 2);
    CHECK_INT_EQ(plan.spans[0].end, 61);
    tp_read_plan_clear(&plan);
    CHECK_OK((tp_read_plan_clear(&plan), tp_read_plan_make(boxes, 4, 9, &plan, &err)),
             &err);
    CHECK_INT_EQ(plan.span_count, 3);
    CHECK_INT_EQ(plan.spans[0].end, 35);
    tp_read_plan_clear(&plan);
}

static void
test_a_wrong_slice_leaves_a_plan_that_can_be_cleared(void)
{
    tp_error err = TP_NO_ERROR;
    tp_read_plan plan = TP_NO_READ_PLAN;
    tp_box boxes[] = {stretch(0, 0, 8), stretch(0, 8, 16)};
    boxes[1].lengths[0] = 9;
    CHECK(tp_read_plan_make(boxes, 2, 0, &plan, &err) < 0);
    tp_read_plan_clear(&plan);
    CHECK_OK((tp_read_plan_clear(&plan), tp_read_plan_make(boxes, 0, 0, &plan, &err)),
             &err);
    CHECK_INT_EQ(plan.span_count, 0);
    tp_read_plan_clear(&plan);
    tp_error_clear(&err);
}

static void
test_slices_that_come_to_too_much_are_refused(void)
{
    tp_error err = TP_NO_ERROR;
    tp_read_plan plan = TP_NO_READ_PLAN;
    const tp_box boxes[] = {stretch(0, 0, INT64_MAX), stretch(1, 0, 1)};
    CHECK_FAILS(
        (tp_read_plan_clear(&plan), tp_read_plan_make(boxes, 2, 0, &plan, &err)),
        TP_VALUE, &err, "slices of 2^63 bytes or more in all");
    CHECK_FAILS(
        (tp_read_plan_clear(&plan), tp_read_plan_make(boxes, 1, -1, &plan, &err)),
        TP_VALUE, &err, "gap: got -1 bytes");
    tp_read_plan_clear(&plan);
}

int
main(void)
{
    RUN(test_slices_are_read_in_the_order_of_the_files);
    RUN(test_spans_join_over_a_gap);
    RUN(test_slices_that_come_to_too_much_are_refused);
    RUN(test_a_wrong_slice_leaves_a_plan_that_can_be_cleared);
    return check_result();
}
