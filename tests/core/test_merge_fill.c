/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "config/merge_recorded_args.h"

static const tp_record record = {2, "bfloat16", 0, 0};
static const tp_record with_group = {2, "bfloat16", 0xa0, 2};

/* A configuration that says nothing. */
static tp_merge_facts
silence(void)
{
    return (tp_merge_facts){.autotp_size = -1, .tp_size = -1, .section = "tp"};
}

static tp_merge_fill
merged(const tp_record *given, const tp_merge_facts *facts)
{
    tp_error err = TP_NO_ERROR;
    tp_merge_fill fill = {-9, -9, false, false};
    CHECK_OK(tp_merge(given, facts, &fill, &err), &err);
    return fill;
}

static void
test_a_silent_configuration_is_filled_from_the_record(void)
{
    const tp_merge_facts facts = silence();
    const tp_merge_fill fill = merged(&record, &facts);
    CHECK_INT_EQ(fill.autotp_size, 2);
    CHECK_INT_EQ(fill.tp_size, 2);
    CHECK(!fill.tp_group);
    CHECK(fill.make_groups);
}

static void
test_equal_values_are_no_conflict_and_nothing_is_filled(void)
{
    tp_merge_facts facts = silence();
    facts.autotp_size = facts.tp_size = facts.tp_group_size = 2;
    facts.tp_group = 0xa0;
    facts.dtype = "torch.bfloat16";
    facts.bf16 = true;
    const tp_merge_fill fill = merged(&with_group, &facts);
    CHECK_INT_EQ(fill.autotp_size, -1);
    CHECK_INT_EQ(fill.tp_size, -1);
    CHECK(!fill.tp_group && !fill.make_groups);
}

static void
test_only_what_is_missing_is_filled(void)
{
    tp_merge_facts facts = silence();
    facts.autotp_size = 2;
    tp_merge_fill fill = merged(&with_group, &facts);
    CHECK_INT_EQ(fill.autotp_size, -1);
    CHECK_INT_EQ(fill.tp_size, 2);
    CHECK(fill.tp_group && !fill.make_groups);
    facts.autotp_size = -1;
    facts.tp_size = 2;
    fill = merged(&with_group, &facts);
    CHECK_INT_EQ(fill.autotp_size, 2);
    CHECK_INT_EQ(fill.tp_size, -1);
}

static void
test_a_configuration_alone_is_filled_with_nothing(void)
{
    tp_merge_facts facts = silence();
    facts.autotp_size = 4;
    const tp_merge_fill fill = merged(NULL, &facts);
    CHECK_INT_EQ(fill.autotp_size, -1);
    CHECK_INT_EQ(fill.tp_size, -1);
    CHECK(!fill.tp_group);
    CHECK(fill.make_groups);
}

static void
test_groups_are_made_only_when_nobody_gave_any(void)
{
    tp_merge_facts mpu = silence(), mesh = silence(), group = silence();
    mpu.has_mpu = true;
    mesh.has_mesh = true;
    group.tp_group = 0xb0;
    CHECK(!merged(&record, &mpu).make_groups);
    CHECK(!merged(&record, &mesh).make_groups);
    CHECK(!merged(&record, &group).make_groups);
    CHECK(!merged(NULL, &mpu).make_groups);
}

static void
test_the_precision_is_that_of_the_switch_and_bf16_wins(void)
{
    CHECK_TEXT_EQ(tp_merge_precision(true, false), "bfloat16");
    CHECK_TEXT_EQ(tp_merge_precision(false, true), "float16");
    CHECK_TEXT_EQ(tp_merge_precision(true, true), "bfloat16");
    CHECK_TEXT_EQ(tp_merge_precision(false, false), NULL);
}

int
main(void)
{
    RUN(test_a_silent_configuration_is_filled_from_the_record);
    RUN(test_equal_values_are_no_conflict_and_nothing_is_filled);
    RUN(test_only_what_is_missing_is_filled);
    RUN(test_a_configuration_alone_is_filled_with_nothing);
    RUN(test_groups_are_made_only_when_nobody_gave_any);
    RUN(test_the_precision_is_that_of_the_switch_and_bf16_wins);
    return check_result();
}
