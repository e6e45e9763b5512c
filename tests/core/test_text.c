/* SPDX-License-Identifier: Apache-2.0 */
#include "base/text.h"

#include <stdlib.h>

#include "check.h"

static void
test_pieces_are_joined_in_order(void)
{
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    char *out = NULL;
    tp_text_add(&text, "%s has ", "w");
    tp_text_add(&text, "%d rows", 12);
    CHECK_INT_EQ(text.size, 13);
    CHECK_TEXT_EQ(text.data, "w has 12 rows");
    CHECK_OK(tp_text_take(&text, &out, &err), &err);
    CHECK_TEXT_EQ(out, "w has 12 rows");
    free(out);
}

static void
test_a_text_without_pieces_is_empty_and_not_null(void)
{
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    char *out = NULL;
    CHECK_OK(tp_text_take(&text, &out, &err), &err);
    CHECK_TEXT_EQ(out, "");
    free(out);
}

static void
test_taking_leaves_an_empty_text_that_can_be_used_again(void)
{
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    char *first = NULL, *second = NULL;
    tp_text_add(&text, "first");
    CHECK_OK(tp_text_take(&text, &first, &err), &err);
    CHECK(text.data == NULL && text.size == 0);
    tp_text_add(&text, "second");
    CHECK_OK(tp_text_take(&text, &second, &err), &err);
    CHECK_TEXT_EQ(first, "first");
    CHECK_TEXT_EQ(second, "second");
    free(first);
    free(second);
}

static void
test_a_text_grows_over_every_size(void)
{
    tp_text text = TP_NO_TEXT;
    for (size_t size = 0; size < 3000; size++) {
        tp_text_add(&text, "%c", (int)('a' + size % 26));
        if (!CHECK_INT_EQ(text.size, size + 1) || !CHECK(text.data[size + 1] == '\0'))
            break;
    }
    for (size_t i = 0; i < text.size; i++)
        if (!CHECK_INT_EQ(text.data[i], 'a' + i % 26))
            break;
    tp_text_free(&text);
    CHECK(text.data == NULL);
}

static void
test_one_piece_may_be_larger_than_the_room(void)
{
    char piece[2000];
    memset(piece, 'x', sizeof(piece) - 1);
    piece[sizeof(piece) - 1] = '\0';
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "%s%s", piece, piece);
    CHECK_INT_EQ(text.size, 2 * (sizeof(piece) - 1));
    tp_text_free(&text);
}

static void
test_a_failed_text_stays_failed_until_it_is_taken(void)
{
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    char *out = NULL;
    tp_text_add(&text, "begun");
    text.failed = true;
    tp_text_add(&text, " and lost");
    CHECK_INT_EQ(text.size, 5);
    CHECK_FAILS(tp_text_take(&text, &out, &err), TP_MEMORY, &err, "out of memory");
    CHECK(out == NULL);
    CHECK(text.data == NULL);
}

static void
test_a_text_becomes_the_message_of_an_error(void)
{
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "100%% of %s", "%s");
    const int result = tp_text_fail(&text, TP_TYPE, &err); /* takes the text */
    CHECK_FAILS(result, TP_TYPE, &err, "100% of %s");
    CHECK(text.data == NULL);
    text.failed = true;
    CHECK_FAILS(tp_text_fail(&text, TP_TYPE, &err), TP_MEMORY, &err, "out of memory");
}

static void
test_names_are_the_same_in_any_case_of_ascii_letters(void)
{
    CHECK(tp_text_same("", ""));
    CHECK(tp_text_same("ColWise_1", "cOLwISE_1"));
    CHECK(!tp_text_same("row", "rows"));
    CHECK(!tp_text_same("rows", "row"));
    CHECK(!tp_text_same("a[", "a{"));
    CHECK(!tp_text_same("@", "`"));
}

static void
test_the_end_of_a_string_is_in_no_set_of_letters(void)
{
    CHECK(tp_text_is_one_of('b', "abc"));
    CHECK(!tp_text_is_one_of('B', "abc"));
    CHECK(!tp_text_is_one_of('\0', "abc"));
}

int
main(void)
{
    RUN(test_pieces_are_joined_in_order);
    RUN(test_a_text_without_pieces_is_empty_and_not_null);
    RUN(test_taking_leaves_an_empty_text_that_can_be_used_again);
    RUN(test_a_text_grows_over_every_size);
    RUN(test_one_piece_may_be_larger_than_the_room);
    RUN(test_a_failed_text_stays_failed_until_it_is_taken);
    RUN(test_a_text_becomes_the_message_of_an_error);
    RUN(test_names_are_the_same_in_any_case_of_ascii_letters);
    RUN(test_the_end_of_a_string_is_in_no_set_of_letters);
    return check_result();
}
