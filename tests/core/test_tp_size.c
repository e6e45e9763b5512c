/* SPDX-License-Identifier: Apache-2.0 */
#include "config/tp_size.h"

#include "check.h"

static void
check_settles(const tp_size_source *sources, int count, int64_t want)
{
    tp_error err = TP_NO_ERROR;
    int64_t size = -9;
    CHECK_OK(tp_size_settle(sources, count, &size, &err), &err);
    CHECK_INT_EQ(size, want);
}

static void
test_sources_that_agree_settle_it(void)
{
    const tp_size_source sources[] = {{"a", -1}, {"b", 4}, {"c", 4}};
    check_settles(sources, 3, 4);
    check_settles(sources, 1, -1);
    check_settles(NULL, 0, -1);
}

static void
test_zero_and_one_are_the_same_size(void)
{
    const tp_size_source sources[] = {{"a", 0}, {"b", 1}};
    check_settles(sources, 2, 1);
    check_settles(sources, 1, 1);
}

static void
test_sources_that_differ_are_all_named(void)
{
    const tp_size_source sources[] = {
        {"a", 2}, {"b", -1}, {"c", 2}, {"d", 4}, {"e", 2}};
    tp_error err = TP_NO_ERROR;
    int64_t size = -9;
    CHECK_INT_EQ(tp_size_settle(sources, 5, &size, &err), -1);
    CHECK_INT_EQ(err.code, TP_VALUE);
    CHECK_TEXT_EQ(tp_error_text(&err),
                  "TP size: a is 2, c is 2, e is 2, but d is 4; give it in one "
                  "place, or the same size everywhere");
    CHECK_INT_EQ(size, -9);
    tp_error_clear(&err);
}

static void
test_where_no_source_states_a_size_none_is_named(void)
{
    const tp_size_source sources[] = {{"a", -1}};
    tp_text text = TP_NO_TEXT;
    tp_size_add_sources(&text, sources, 1);
    CHECK_TEXT_EQ(text.data, "TP size: ");
    tp_text_free(&text);
}

int
main(void)
{
    RUN(test_sources_that_agree_settle_it);
    RUN(test_zero_and_one_are_the_same_size);
    RUN(test_sources_that_differ_are_all_named);
    RUN(test_where_no_source_states_a_size_none_is_named);
    return check_result();
}
