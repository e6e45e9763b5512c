/* SPDX-License-Identifier: Apache-2.0 */
#include "config/merge_recorded_args.h"

#include <stdlib.h>

#include "base/text.h"
#include "check.h"

static const tp_record record = {2, "bfloat16", 0, 0};
static const tp_record with_group = {2, "bfloat16", 0xa0, 2};

/* A configuration that says nothing. */
static tp_merge_facts
silence(void)
{
    return (tp_merge_facts){.autotp_size = -1, .tp_size = -1, .section = "tp"};
}

static void
check_fine(const tp_record *given, const tp_merge_facts *facts)
{
    tp_error err = TP_NO_ERROR;
    tp_merge_fill fill;
    CHECK_OK(tp_merge(given, facts, &fill, &err), &err);
}

/* The message is the headline, exactly `lines`, and what to do. */
static void
check_conflicts(const tp_record *given, const tp_merge_facts *facts, int count,
                const char *const *lines)
{
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    char *want = NULL;
    tp_text_add(&text, "%d conflict%s in the tensor-parallel settings:\n", count,
                count == 1 ? "" : "s");
    for (int i = 0; i < count; i++)
        tp_text_add(&text, "  - %s\n", lines[i]);
    tp_text_add(&text,
                "Give each value in one place only, or the same value everywhere%s.",
                given == NULL
                    ? ""
                    : "; deepspeed_autotp.reset() forgets what tp_model_init recorded");
    CHECK_OK(tp_text_take(&text, &want, &err), &err);

    tp_merge_fill fill = {-9, -9, true, true};
    CHECK_INT_EQ(tp_merge(given, facts, &fill, &err), -1);
    CHECK_INT_EQ(err.code, TP_VALUE);
    CHECK_TEXT_EQ(tp_error_text(&err), want);
    CHECK_INT_EQ(fill.autotp_size, -9);
    tp_error_clear(&err);
    free(want);
}

static void
check_conflict(const tp_record *given, const tp_merge_facts *facts, const char *line)
{
    check_conflicts(given, facts, 1, &line);
}

static void
test_a_recorded_group_and_an_mpu_conflict(void)
{
    tp_merge_facts facts = silence();
    facts.has_mpu = true;
    check_conflict(&with_group, &facts,
                   "mpu: passed to initialize(mpu=...), but tp_model_init provided "
                   "tp_group, the group 0xa0 of 2 ranks");
}

static void
test_a_rank_outside_of_a_recorded_group_conflicts(void)
{
    const tp_record outside = {2, "bfloat16", 0xa0, -1};
    const char *const lines[] = {
        "tp_group of tp_model_init: this rank is not in the group; pass on each rank "
        "the group that it belongs to",
        "mpu: passed to initialize(mpu=...), but tp_model_init provided tp_group, the "
        "group 0xa0",
    };
    tp_merge_facts facts = silence();
    check_conflict(&outside, &facts, lines[0]);
    facts.has_mpu = true;
    check_conflicts(&outside, &facts, 2, lines);
}

static void
test_another_autotp_size_conflicts(void)
{
    tp_merge_facts facts = silence();
    facts.autotp_size = 4;
    check_conflict(&record, &facts,
                   "TP size: tensor_parallel.autotp_size is 4, but tp_size of "
                   "tp_model_init is 2");
}

static void
test_an_explicit_zero_or_one_switches_off_and_conflicts_with_more(void)
{
    const tp_record one = {1, "bfloat16", 0, 0};
    tp_merge_facts facts = silence();
    facts.autotp_size = 0;
    check_conflict(&record, &facts,
                   "TP size: tensor_parallel.autotp_size is 0, but tp_size of "
                   "tp_model_init is 2");
    check_fine(&one, &facts);
    facts.autotp_size = 1;
    check_conflict(&record, &facts,
                   "TP size: tensor_parallel.autotp_size is 1, but tp_size of "
                   "tp_model_init is 2");
}

static void
test_another_tp_size_conflicts_and_names_the_spelling_of_its_section(void)
{
    tp_merge_facts facts = silence();
    facts.tp_size = 1;
    check_conflict(&record, &facts,
                   "TP size: tensor_parallel.tp.tp_size is 1, but tp_size of "
                   "tp_model_init is 2");
    facts.section = "tensor_parallel";
    check_conflict(&record, &facts,
                   "TP size: tensor_parallel.tensor_parallel.tp_size is 1, but tp_size "
                   "of tp_model_init is 2");
}

static void
test_another_group_conflicts(void)
{
    const char *const lines[] = {
        "TP size: the size of tensor_parallel.tp.tp_group is 1, but tp_size of "
        "tp_model_init is 2, the size of tp_group of tp_model_init is 2",
        "Conflicting tensor_parallel.tp.tp_group: the group 0xb0 of 1 rank in the "
        "configuration, "
        "but the group 0xa0 of 2 ranks in tp_model_init(tp_group=...)",
    };
    tp_merge_facts facts = silence();
    facts.tp_group = 0xb0;
    check_conflict(&with_group, &facts,
                   "Conflicting tensor_parallel.tp.tp_group: the group 0xb0 in the "
                   "configuration, but "
                   "the group 0xa0 of 2 ranks in tp_model_init(tp_group=...)");
    facts.tp_group_size = 1;
    check_conflicts(&with_group, &facts, 2, lines);
}

static void
test_a_group_of_another_size_conflicts(void)
{
    const tp_record odd = {2, "bfloat16", 0xa0, 4};
    tp_merge_facts facts = silence();
    check_conflict(&odd, &facts,
                   "TP size: tp_size of tp_model_init is 2, but the size of tp_group "
                   "of tp_model_init is 4");
    facts.tp_group = 0xb0;
    facts.tp_group_size = 4;
    check_conflict(&record, &facts,
                   "TP size: the size of tensor_parallel.tp.tp_group is 4, but tp_size "
                   "of tp_model_init is 2");
}

static void
test_a_recorded_dtype_conflicts_with_the_switch_of_another(void)
{
    const tp_record half = {2, "float16", 0, 0};
    const tp_record full = {2, "float32", 0, 0};
    tp_merge_facts facts = silence();
    facts.bf16 = true;
    check_conflict(
        &half, &facts,
        "Conflicting dtype: bf16.enabled: true in the configuration, but float16 in "
        "tp_model_init(dtype=float16)");
    check_conflict(
        &full, &facts,
        "Conflicting dtype: bf16.enabled: true in the configuration, but float32 in "
        "tp_model_init(dtype=float32)");
    facts.bf16 = false;
    facts.fp16 = true;
    check_conflict(
        &record, &facts,
        "Conflicting dtype: fp16.enabled: true in the configuration, but bfloat16 in "
        "tp_model_init(dtype=bfloat16)");
}

static void
test_any_recorded_dtype_is_fine_without_a_switch_and_its_own_with_it(void)
{
    const char *const dtypes[] = {"float32", "bfloat16", "float16"};
    for (int i = 0; i < 3; i++) {
        const tp_record given = {2, dtypes[i], 0, 0};
        tp_merge_facts facts = silence();
        check_fine(&given, &facts);
        facts.bf16 = i == 1;
        facts.fp16 = i == 2;
        check_fine(&given, &facts);
    }
}

static void
test_both_switches_conflict_by_themselves(void)
{
    const char *const lines[] = {
        "bf16.enabled: true in the configuration, but true in fp16.enabled, too",
        "Conflicting dtype: bf16.enabled: true in the configuration, but float32 in "
        "tp_model_init(dtype=float32)",
    };
    const tp_record half = {2, "float16", 0, 0};
    const tp_record full = {2, "float32", 0, 0};
    tp_merge_facts facts = silence();
    facts.bf16 = facts.fp16 = true;
    check_conflict(NULL, &facts, lines[0]);
    check_conflict(&half, &facts, lines[0]);
    check_conflicts(&full, &facts, 2, lines);
}

static void
test_a_configured_dtype_conflicts_with_the_record_and_the_switches(void)
{
    tp_merge_facts facts = silence();
    facts.dtype = "half";
    check_conflict(
        &record, &facts,
        "Conflicting tensor_parallel.dtype: half in the configuration, but bfloat16 in "
        "tp_model_init(dtype=bfloat16)");
    facts.bf16 = true;
    check_conflict(
        NULL, &facts,
        "tensor_parallel.dtype: half in the configuration, but true in bf16.enabled");
    facts.bf16 = false;
    facts.fp16 = true;
    check_fine(NULL, &facts);
    facts.dtype = "bf16";
    check_conflict(
        NULL, &facts,
        "tensor_parallel.dtype: bf16 in the configuration, but true in fp16.enabled");
}

static void
test_an_unknown_dtype_is_a_line_of_its_own_with_the_nearest(void)
{
    tp_merge_facts facts = silence();
    facts.dtype = "bfloat61";
    facts.autotp_size = 4;
    tp_error err = TP_NO_ERROR;
    tp_merge_fill fill;
    const int result = tp_merge(&record, &facts, &fill, &err);
    CHECK_TEXT_HAS(tp_error_text(&err), "2 conflicts in the tensor-parallel settings:");
    CHECK_TEXT_HAS(tp_error_text(&err),
                   "  - TP size: tensor_parallel.autotp_size is 4");
    CHECK_TEXT_HAS(tp_error_text(&err), "\n  - tensor_parallel.dtype: 'bfloat61'");
    CHECK_FAILS(result, TP_VALUE, &err, "did you mean 'bfloat16'");
}

static void
test_a_configuration_is_checked_against_itself(void)
{
    tp_merge_facts facts = silence();
    facts.autotp_size = 4;
    facts.tp_size = 2;
    facts.tp_group = 0xb0;
    facts.tp_group_size = 8;
    check_conflict(NULL, &facts,
                   "TP size: tensor_parallel.autotp_size is 4, but "
                   "tensor_parallel.tp.tp_size is 2, the size of "
                   "tensor_parallel.tp.tp_group is 8");
}

static void
test_every_conflict_of_a_call_is_in_one_message(void)
{
    const char *const lines[] = {
        "TP size: tensor_parallel.autotp_size is 4, tensor_parallel.tp.tp_size is 4, "
        "the size of tensor_parallel.tp.tp_group is 4, but tp_size of tp_model_init is "
        "2, the "
        "size of tp_group of tp_model_init is 2",
        "Conflicting tensor_parallel.tp.tp_group: the group 0xb0 of 4 ranks in the "
        "configuration, "
        "but the group 0xa0 of 2 ranks in tp_model_init(tp_group=...)",
        "mpu: passed to initialize(mpu=...), but tp_model_init provided tp_group, the "
        "group 0xa0 of 2 ranks",
        "Conflicting dtype: fp16.enabled: true in the configuration, but bfloat16 in "
        "tp_model_init(dtype=bfloat16)",
        "Conflicting tensor_parallel.dtype: fp32 in the configuration, but bfloat16 in "
        "tp_model_init(dtype=bfloat16)",
        "tensor_parallel.dtype: fp32 in the configuration, but true in fp16.enabled",
    };
    tp_merge_facts facts = silence();
    facts.autotp_size = facts.tp_size = facts.tp_group_size = 4;
    facts.tp_group = 0xb0;
    facts.fp16 = facts.has_mpu = true;
    facts.dtype = "fp32";
    check_conflicts(&with_group, &facts, 6, lines);
}

static void
test_a_conflict_without_memory_is_an_error_all_the_same(void)
{
    tp_error err = TP_NO_ERROR;
    tp_merge_fill fill;
    tp_merge_facts facts = silence();
    facts.dtype = "float99";
    CHECK_FAILS(tp_merge(&record, &facts, &fill, &err), TP_VALUE, &err, "float99");
    facts.dtype = "float16";
    CHECK_FAILS(tp_merge(&record, &facts, &fill, &err), TP_VALUE, &err,
                "float16 in the configuration");
}

int
main(void)
{
    RUN(test_a_recorded_group_and_an_mpu_conflict);
    RUN(test_a_rank_outside_of_a_recorded_group_conflicts);
    RUN(test_another_autotp_size_conflicts);
    RUN(test_an_explicit_zero_or_one_switches_off_and_conflicts_with_more);
    RUN(test_another_tp_size_conflicts_and_names_the_spelling_of_its_section);
    RUN(test_another_group_conflicts);
    RUN(test_a_group_of_another_size_conflicts);
    RUN(test_a_recorded_dtype_conflicts_with_the_switch_of_another);
    RUN(test_any_recorded_dtype_is_fine_without_a_switch_and_its_own_with_it);
    RUN(test_both_switches_conflict_by_themselves);
    RUN(test_a_configured_dtype_conflicts_with_the_record_and_the_switches);
    RUN(test_an_unknown_dtype_is_a_line_of_its_own_with_the_nearest);
    RUN(test_a_configuration_is_checked_against_itself);
    RUN(test_every_conflict_of_a_call_is_in_one_message);
    RUN(test_a_conflict_without_memory_is_an_error_all_the_same);
    return check_result();
}
