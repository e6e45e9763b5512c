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

static void
test_what_a_terminal_obeys_is_written_as_an_escape(void)
{
    static const struct {
        const char *given;
        const char *want;
    } cases[] = {
        {"a\x1b[0m\tb\x7f", "a\\x1b[0m\\x09b\\x7f"},
        {"\xc2\x9b[0m", "\\x9b[0m"},                      /* the C1 control U+009B */
        {"a\xd8\x9c", "a\\u061c"},                        /* Arabic letter mark */
        {"\xe2\x80\x8e\xe2\x80\x8f", "\\u200e\\u200f"},   /* left-to-right, back */
        {"\xe2\x80\xa8\xe2\x80\xae", "\\u2028\\u202e"},   /* line end, override */
        {"\xe2\x81\xa6 \xe2\x81\xa9", "\\u2066 \\u2069"}, /* isolates */
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        tp_error err = TP_NO_ERROR;
        CHECK_INT_EQ(tp_fail(&err, TP_VALUE, "%s", cases[i].given), -1);
        CHECK_TEXT_EQ(tp_error_text(&err), cases[i].want);
        tp_error_clear(&err);
    }
}

static void
test_other_letters_lines_and_bytes_that_are_no_utf8_stay(void)
{
    static const char *const kept[] = {
        "two\nlines",
        "\xc3\xa9\xd8\x9b",                     /* beside U+061C */
        "\xe2\x80\x8d\xe2\x80\x90",             /* around U+200E and U+200F */
        "\xe2\x80\xa7\xe2\x80\xaf",             /* around U+2028 to U+202E */
        "\xe2\x81\xa5\xe2\x81\xaa\xe2\x82\xac", /* around U+2066 to U+2069 */
        "\xe3\x80\x8e",
        "\xe2\x80",
        "\xe2(\x8e",
        "\xe2\x80(",
        "\xc2(",
        "\xc2",
    };
    for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++) {
        tp_error err = TP_NO_ERROR;
        tp_fail(&err, TP_VALUE, "%s", kept[i]);
        CHECK_TEXT_EQ(tp_error_text(&err), kept[i]);
        tp_error_clear(&err);
    }
}

static void
test_a_message_of_any_length_loses_its_middle_alone(void)
{
    enum { SIZE = 30000, MOST = 16384 };
    static char name[SIZE + 1];
    memset(name, 'n', SIZE);
    tp_error err = TP_NO_ERROR;
    tp_fail(&err, TP_VALUE, "first %s last", name);
    const char *text = tp_error_text(&err);
    CHECK_INT_EQ(strlen(text), MOST);
    CHECK(strncmp(text, "first nnn", 9) == 0);
    CHECK_TEXT_HAS(text, "nnn ... nnn");
    CHECK_TEXT_EQ(text + MOST - 8, "nnn last");
    tp_error_clear(&err);
}

static void
test_without_memory_for_a_message_the_code_says_so(void)
{
    tp_error err = TP_NO_ERROR;
    /* Without memory for the escape as well as for the message itself. */
    CHECK_FAILS(tp_fail(&err, TP_VALUE, "a\x1b"), TP_VALUE, &err, "a\\x1b");
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
    RUN(test_what_a_terminal_obeys_is_written_as_an_escape);
    RUN(test_other_letters_lines_and_bytes_that_are_no_utf8_stay);
    RUN(test_a_message_of_any_length_loses_its_middle_alone);
    RUN(test_without_memory_for_a_message_the_code_says_so);
    return check_result();
}
