/* SPDX-License-Identifier: Apache-2.0 */
#include "cost/layouts.h"

#include <string.h>

#include "check.h"

enum { MANY = 24 };

static bool
better(const tp_candidate *a, const tp_candidate *b, int64_t memory)
{
    const bool fits = a->bytes <= memory, other = b->bytes <= memory;
    const double time = a->seconds / (double)a->replicas;
    const double against = b->seconds / (double)b->replicas;
    if (fits != other)
        return fits;
    if (!fits && a->bytes != b->bytes)
        return a->bytes < b->bytes;
    if (time < against || time > against)
        return time < against;
    if (a->replicas != b->replicas)
        return a->replicas > b->replicas;
    return a->stage < b->stage;
}

static void
test_no_later_layout_is_better_than_an_earlier_one(void)
{
    tp_candidate candidates[MANY];
    int order[MANY], fitting = 0, expected = 0;
    uint32_t draw = 7;
    for (int i = 0; i < MANY; i++) {
        draw = draw * 1664525u + 1013904223u;
        candidates[i] = (tp_candidate){.tp = 1 << (i % 4),
                                       .replicas = 8 >> (i % 4),
                                       .stage = i / 4 % 4,
                                       .bytes = 50 + (int64_t)(draw >> 26),
                                       .seconds = (double)(draw >> 30)};
        expected += candidates[i].bytes <= 80;
    }
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_order_layouts(candidates, MANY, 80, order, &fitting, &err), &err);
    CHECK_INT_EQ(fitting, expected);
    for (int i = 0; i < MANY; i++)
        for (int j = i + 1; j < MANY; j++)
            CHECK(!better(&candidates[order[j]], &candidates[order[i]], 80));
    CHECK(tp_order_layouts(candidates, MANY, 0, order, &fitting, &err) < 0);
    tp_error_clear(&err);
}

static void
test_times_that_print_alike_leave_it_to_the_stage_of_zero(void)
{
    const tp_candidate candidates[] = {{1, 8, 3, 1, 1.000001},
                                       {1, 8, 2, 1, 1.000002},
                                       {1, 8, 1, 1, 1.000003},
                                       {1, 8, 0, 1, 1.00001}};
    int order[4], fitting = 0;
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_order_layouts(candidates, 4, 80, order, &fitting, &err), &err);
    CHECK(order[0] == 2 && order[1] == 1 && order[2] == 0 && order[3] == 3);
}

static void
check_reason(const tp_candidate *at, const tp_candidate *before, const char *words)
{
    const tp_candidate first = {.tp = 1, .replicas = 8, .bytes = 1, .seconds = 1};
    tp_text text = TP_NO_TEXT;
    tp_layout_reason(&text, at, before, &first, (int64_t)4 << 30);
    if (CHECK(text.data != NULL))
        CHECK(strstr(text.data, words) != NULL);
    tp_text_free(&text);
}

static void
test_a_reason_says_what_decided(void)
{
    const tp_candidate first = {1, 8, 1, 1, 1}, slower = {2, 4, 1, 1, 1};
    const tp_candidate higher = {1, 8, 2, 1, 1}, fewer = {2, 4, 1, 1, 0.5};
    const tp_candidate large = {1, 8, 0, (int64_t)5 << 30, 1};
    check_reason(&first, NULL, "least communication time");
    check_reason(&slower, &first, "2.00 times the communication time of the first");
    check_reason(&higher, &first, "a higher stage of ZeRO");
    check_reason(&fewer, &first, "fewer data-parallel ranks");
    check_reason(&large, &first, "does not fit: needs 5.0 GiB");
}

static void
test_a_first_without_communication_is_no_measure_of_others(void)
{
    const tp_candidate first = {1, 8, 1, 1, 1e-6}, slower = {2, 4, 1, 1, 1};
    tp_text text = TP_NO_TEXT;
    tp_layout_reason(&text, &slower, &first, &first, (int64_t)4 << 30);
    CHECK_TEXT_EQ(text.data, "fits in 0.0 GiB; more communication time than the first");
    tp_text_free(&text);
}

static void
test_times_of_many_years_are_ordered_as_well(void)
{
    const tp_candidate candidates[] = {{1, 1, 0, 1, 3e12}, {1, 1, 0, 1, 2e12}};
    int order[2], fitting = 0;
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_order_layouts(candidates, 2, 80, order, &fitting, &err), &err);
    CHECK(order[0] == 1 && order[1] == 0);
}

int
main(void)
{
    RUN(test_no_later_layout_is_better_than_an_earlier_one);
    RUN(test_times_that_print_alike_leave_it_to_the_stage_of_zero);
    RUN(test_a_reason_says_what_decided);
    RUN(test_a_first_without_communication_is_no_measure_of_others);
    RUN(test_times_of_many_years_are_ordered_as_well);
    return check_result();
}
