/* SPDX-License-Identifier: Apache-2.0 */
#include "config/recorded_args.h"

#include <stddef.h>

#include "check.h"

static tp_records *
new_records(void)
{
    tp_error err = TP_NO_ERROR;
    tp_records *records = NULL;
    CHECK_OK(tp_records_new(&records, &err), &err);
    return records;
}

static void
add(tp_records *records, int64_t key, const tp_record *record)
{
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_records_add(records, key, record, &err), &err);
}

/* `later` conflicts with a live `earlier`: `part` is said, and nothing changes. */
static void
check_conflict(const tp_record *earlier, const tp_record *later, const char *part)
{
    tp_error err = TP_NO_ERROR;
    tp_records *records = new_records();
    add(records, 1, earlier);
    for (int64_t key = 1; key <= 2; key++) {
        const int result = tp_records_add(records, key, later, &err);
        CHECK_TEXT_HAS(tp_error_text(&err),
                       "an earlier call whose model is still alive");
        CHECK_TEXT_HAS(tp_error_text(&err), "deepspeed_autotp.reset()");
        CHECK_FAILS(result, TP_VALUE, &err, part);
    }
    CHECK_INT_EQ(tp_records_count(records), 1);
    CHECK_INT_EQ(tp_records_find(records, 1)->tp_size, earlier->tp_size);
    tp_records_free(records);
}

static const tp_record plain = {2, "bfloat16", 0, 0};

static void
test_a_record_is_found_by_its_key_only(void)
{
    tp_records *records = new_records();
    const tp_record given = {4, "float16", 0xabc, 4};
    add(records, 7, &given);
    const tp_record *found = tp_records_find(records, 7);
    if (CHECK(found != NULL)) {
        CHECK_INT_EQ(found->tp_size, 4);
        CHECK_TEXT_EQ(found->dtype, "float16");
        CHECK_INT_EQ(found->group, 0xabc);
        CHECK_INT_EQ(found->group_size, 4);
    }
    CHECK(tp_records_find(records, 8) == NULL);
    tp_records_free(records);
}

static void
test_another_tp_size_names_both_values(void)
{
    const tp_record later = {4, "bfloat16", 0, 0};
    check_conflict(&plain, &later, "tp_size: 4 now, but 2 before");
}

static void
test_another_dtype_names_both_values(void)
{
    const tp_record later = {2, "float32", 0, 0};
    check_conflict(&plain, &later, "dtype: float32 now, but bfloat16 before");
}

static void
test_another_group_names_both_values(void)
{
    const tp_record a = {2, "bfloat16", 0xa0, 2};
    const tp_record b = {2, "bfloat16", 0xb0, 2};
    check_conflict(&a, &b, "tp_group: the group 0xb0 now, but the group 0xa0 before");
    check_conflict(&plain, &b, "tp_group: the group 0xb0 now, but no group before");
    check_conflict(&a, &plain, "tp_group: no group now, but the group 0xa0 before");
}

static void
test_every_differing_argument_is_in_one_message(void)
{
    const tp_record later = {4, "float16", 0xb0, 0};
    check_conflict(&plain, &later,
                   "\n  - tp_size: 4 now, but 2 before"
                   "\n  - dtype: float16 now, but bfloat16 before"
                   "\n  - tp_group: the group 0xb0 now, but no group before\n");
}

static void
test_equal_arguments_for_another_model_are_fine(void)
{
    tp_records *records = new_records();
    const char dtype[] = "bfloat16"; /* equal text at another address */
    const tp_record equal = {2, dtype, 0, 0};
    add(records, 1, &plain);
    add(records, 2, &equal);
    CHECK_INT_EQ(tp_records_count(records), 2);
    tp_records_free(records);
}

static void
test_an_unknown_group_size_is_no_conflict(void)
{
    tp_records *records = new_records();
    const tp_record known = {2, "bfloat16", 0xa0, 2};
    const tp_record unknown = {2, "bfloat16", 0xa0, 0};
    add(records, 1, &known);
    add(records, 2, &unknown);
    add(records, 3, &known);
    CHECK_INT_EQ(tp_records_count(records), 3);
    tp_records_free(records);
}

static void
test_recording_again_replaces_and_becomes_the_latest(void)
{
    tp_records *records = new_records();
    int64_t key = 0;
    add(records, 1, &plain);
    add(records, 2, &plain);
    add(records, 1, &plain);
    CHECK_INT_EQ(tp_records_count(records), 2);
    CHECK(tp_records_latest(records, &key) != NULL);
    CHECK_INT_EQ(key, 1);
    tp_records_free(records);
}

static void
test_the_latest_is_the_last_that_is_still_alive(void)
{
    tp_records *records = new_records();
    int64_t key = 0;
    CHECK(tp_records_latest(records, &key) == NULL);
    for (int64_t i = 1; i <= 9; i++)
        add(records, i, &plain);
    tp_records_remove(records, 9);
    tp_records_remove(records, 4);
    tp_records_remove(records, 99);
    CHECK_INT_EQ(tp_records_count(records), 7);
    CHECK(tp_records_latest(records, &key) != NULL);
    CHECK_INT_EQ(key, 8);
    CHECK(tp_records_find(records, 4) == NULL);
    CHECK(tp_records_find(records, 5) != NULL);
    tp_records_free(records);
}

static void
test_a_dead_record_conflicts_with_nothing(void)
{
    tp_records *records = new_records();
    const tp_record other = {8, "float32", 0, 0};
    add(records, 1, &plain);
    tp_records_remove(records, 1);
    add(records, 2, &other);
    tp_records_clear(records);
    CHECK_INT_EQ(tp_records_count(records), 0);
    add(records, 3, &plain);
    CHECK_INT_EQ(tp_records_find(records, 3)->tp_size, 2);
    tp_records_free(records);
}

static void
test_a_record_of_the_list_can_be_added_under_another_key(void)
{
    tp_records *records = new_records();
    add(records, 0, &plain);
    for (int64_t key = 1; key < 40; key++)
        add(records, key, tp_records_find(records, 0));
    CHECK_INT_EQ(tp_records_count(records), 40);
    CHECK_TEXT_EQ(tp_records_find(records, 39)->dtype, "bfloat16");
    tp_records_free(records);
}

static void
test_a_tp_size_below_one_is_refused(void)
{
    tp_error err = TP_NO_ERROR;
    tp_records *records = new_records();
    const tp_record zero = {0, "float16", 0, 0};
    CHECK_FAILS(tp_records_add(records, 1, &zero, &err), TP_VALUE, &err,
                "tp_model_init: tp_size is 0, but it must be at least 1");
    CHECK_INT_EQ(tp_records_count(records), 0);
    tp_records_free(records);
}

static void
test_a_group_of_another_size_is_refused(void)
{
    tp_error err = TP_NO_ERROR;
    tp_records *records = new_records();
    const tp_record record = {2, "float16", 0xa0, 4};
    CHECK_FAILS(tp_records_add(records, 1, &record, &err), TP_VALUE, &err,
                "tp_model_init: tp_group has 4 ranks, but tp_size is 2");
    tp_records_free(records);
    tp_records_free(NULL);
}

int
main(void)
{
    RUN(test_a_record_is_found_by_its_key_only);
    RUN(test_another_tp_size_names_both_values);
    RUN(test_another_dtype_names_both_values);
    RUN(test_another_group_names_both_values);
    RUN(test_every_differing_argument_is_in_one_message);
    RUN(test_equal_arguments_for_another_model_are_fine);
    RUN(test_an_unknown_group_size_is_no_conflict);
    RUN(test_recording_again_replaces_and_becomes_the_latest);
    RUN(test_the_latest_is_the_last_that_is_still_alive);
    RUN(test_a_dead_record_conflicts_with_nothing);
    RUN(test_a_record_of_the_list_can_be_added_under_another_key);
    RUN(test_a_tp_size_below_one_is_refused);
    RUN(test_a_group_of_another_size_is_refused);
    return check_result();
}
