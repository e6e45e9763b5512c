/* SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>

#include "check.h"

static void
test_a_failure_keeps_its_code_and_formatted_message(void)
{
    tp_error err = TP_NO_ERROR;
    CHECK_INT_EQ(tp_fail(&err, TP_TYPE, "size %d of '%s'", 7, "w"), -1);
    CHECK_INT_EQ(err.code, TP_TYPE);
    CHECK_TEXT_EQ(tp_error_text(&err), "size 7 of 'w'");
    tp_error_clear(&err);
}

static void
test_a_second_failure_replaces_the_first_and_may_quote_it(void)
{
    tp_error err = TP_NO_ERROR;
    tp_fail(&err, TP_VALUE, "inner");
    tp_fail(&err, TP_BUG, "outer: %s", tp_error_text(&err));
    CHECK_INT_EQ(err.code, TP_BUG);
    CHECK_TEXT_EQ(tp_error_text(&err), "outer: inner");
    tp_error_clear(&err);
}

static void
test_a_long_message_is_kept_whole(void)
{
    char long_name[5001];
    memset(long_name, 'n', sizeof(long_name) - 1);
    long_name[sizeof(long_name) - 1] = '\0';
    tp_error err = TP_NO_ERROR;
    tp_fail(&err, TP_VALUE, "<%s>", long_name);
    CHECK_INT_EQ(strlen(tp_error_text(&err)), 5002);
    tp_error_clear(&err);
}

static void
test_running_out_of_memory_needs_no_memory_for_its_message(void)
{
    tp_error err = TP_NO_ERROR;
    tp_fail(&err, TP_VALUE, "before");
    CHECK_INT_EQ(tp_fail_memory(&err), -1);
    CHECK_INT_EQ(err.code, TP_MEMORY);
    CHECK(err.message == NULL);
    CHECK_TEXT_EQ(tp_error_text(&err), "out of memory");
    tp_error_clear(&err);
}

static void
test_a_message_is_never_null_whatever_the_code(void)
{
    for (int code = TP_OK; code <= TP_BUG; code++) {
        const tp_error err = {(tp_code)code, NULL};
        CHECK(tp_error_text(&err) != NULL);
    }
}

static void
test_clearing_returns_to_ok_and_can_be_repeated(void)
{
    tp_error err = TP_NO_ERROR;
    tp_fail(&err, TP_LIMIT, "x");
    tp_error_clear(&err);
    tp_error_clear(&err);
    CHECK_INT_EQ(err.code, TP_OK);
    CHECK(err.message == NULL);
}

int
main(void)
{
    RUN(test_a_failure_keeps_its_code_and_formatted_message);
    RUN(test_a_second_failure_replaces_the_first_and_may_quote_it);
    RUN(test_a_long_message_is_kept_whole);
    RUN(test_running_out_of_memory_needs_no_memory_for_its_message);
    RUN(test_a_message_is_never_null_whatever_the_code);
    RUN(test_clearing_returns_to_ok_and_can_be_repeated);
    return check_result();
}
