/* SPDX-License-Identifier: Apache-2.0 */
/* merge_recorded_args.c -- recorded arguments against the configuration. */
#include "config/merge_recorded_args.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/dtype.h"
#include "base/text.h"
#include "config/tp_size.h"

/* The conflicts of one call, one line each. The lines keep the words of DeepSpeed's
 * errors, by which programs know them. */
typedef struct {
    const tp_record *record; /* may be NULL */
    const tp_merge_facts *facts;
    tp_text lines;
    int count;
} conflicts;

/* Start a line; the caller writes the rest of it. */
static tp_text *
begin_line(conflicts *all)
{
    all->count++;
    tp_text_add(&all->lines, "\n  - ");
    return &all->lines;
}

enum { SOURCES = 5 };

static void
compare_sizes(conflicts *all)
{
    const tp_merge_facts *facts = all->facts;
    const tp_record *record = all->record;
    char tp_size[64], tp_group[64];
    snprintf(tp_size, sizeof(tp_size), "tensor_parallel.%s.tp_size", facts->section);
    snprintf(tp_group, sizeof(tp_group), "the size of tensor_parallel.%s.tp_group",
             facts->section);
    const tp_size_source sources[SOURCES] = {
        {"tensor_parallel.autotp_size", facts->autotp_size},
        {tp_size, facts->tp_size},
        {tp_group, facts->tp_group_size > 0 ? facts->tp_group_size : -1},
        {"tp_size of tp_model_init", record == NULL ? -1 : record->tp_size},
        {"the size of tp_group of tp_model_init",
         record == NULL || record->group_size == 0 ? -1 : record->group_size},
    };
    if (tp_size_differs(sources, SOURCES))
        tp_size_add_sources(begin_line(all), sources, SOURCES);
}

static void
add_group(tp_text *text, int64_t group, int64_t ranks)
{
    tp_text_add(text, "the group 0x%" PRIx64, (uint64_t)group);
    if (ranks > 0)
        tp_text_add(text, " of %" PRId64 " rank%s", ranks, ranks == 1 ? "" : "s");
}

static void
compare_groups(conflicts *all)
{
    const tp_record *record = all->record;
    const tp_merge_facts *facts = all->facts;
    if (record == NULL || record->group == 0)
        return;
    if (record->group_size < 0)
        tp_text_add(begin_line(all),
                    "tp_group of tp_model_init: this rank is not in the group; pass on "
                    "each rank the group that it belongs to");
    if (facts->tp_group != 0 && facts->tp_group != record->group) {
        tp_text *text = begin_line(all);
        tp_text_add(text, "Conflicting tensor_parallel.%s.tp_group: ", facts->section);
        add_group(text, facts->tp_group, facts->tp_group_size);
        tp_text_add(text, " in the configuration, but ");
        add_group(text, record->group, record->group_size);
        tp_text_add(text, " in tp_model_init(tp_group=...)");
    }
    if (facts->has_mpu) {
        tp_text *text = begin_line(all);
        tp_text_add(text,
                    "mpu: passed to initialize(mpu=...), but "
                    "tp_model_init provided tp_group, ");
        add_group(text, record->group, record->group_size);
    }
}

/* Where both switches are on, that is a line of its own, and either dtype may
 * be the one that was meant. */
static bool
fits_switches(const tp_merge_facts *facts, const char *dtype)
{
    if (!facts->bf16 && !facts->fp16)
        return true;
    return (facts->bf16 && strcmp(dtype, "bfloat16") == 0) ||
           (facts->fp16 && strcmp(dtype, "float16") == 0);
}

static void
compare_switches(conflicts *all)
{
    const tp_merge_facts *facts = all->facts;
    if (facts->bf16 && facts->fp16)
        tp_text_add(
            begin_line(all),
            "bf16.enabled: true in the configuration, but true in fp16.enabled, "
            "too");
    if (all->record != NULL && !fits_switches(facts, all->record->dtype))
        tp_text_add(begin_line(all),
                    "Conflicting dtype: %s.enabled: true in the configuration, but %s "
                    "in tp_model_init(dtype=%s)",
                    facts->bf16 ? "bf16" : "fp16", all->record->dtype,
                    all->record->dtype);
}

/* Returns -1 only where memory runs out: an unknown spelling is one line more. */
static int
compare_dtype(conflicts *all, tp_error *err)
{
    const tp_merge_facts *facts = all->facts;
    if (facts->dtype == NULL)
        return 0;

    const char *dtype = NULL;
    tp_error unknown = TP_NO_ERROR;
    if (tp_dtype_name(facts->dtype, "tensor_parallel.dtype", &dtype, &unknown) < 0) {
        const bool listed = unknown.code == TP_VALUE;
        if (listed)
            tp_text_add(begin_line(all), "%s", tp_error_text(&unknown));
        tp_error_clear(&unknown);
        return listed ? 0 : tp_fail_memory(err);
    }
    if (all->record != NULL && strcmp(dtype, all->record->dtype) != 0)
        tp_text_add(begin_line(all),
                    "Conflicting tensor_parallel.dtype: %s in the configuration, but "
                    "%s in tp_model_init(dtype=%s)",
                    facts->dtype, all->record->dtype, all->record->dtype);
    if (!fits_switches(facts, dtype))
        tp_text_add(begin_line(all),
                    "tensor_parallel.dtype: %s in the configuration, but true in "
                    "%s.enabled",
                    facts->dtype, facts->bf16 ? "bf16" : "fp16");
    return 0;
}

static int
report(conflicts *all, tp_error *err)
{
    char *lines = NULL;
    if (tp_text_take(&all->lines, &lines, err) < 0)
        return -1;
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "%d conflict%s in the tensor-parallel settings:%s\n", all->count,
                all->count == 1 ? "" : "s", lines);
    tp_text_add(&text,
                "Give each value in one place only, or the same value everywhere");
    if (all->record != NULL)
        tp_text_add(&text,
                    "; deepspeed_autotp.reset() forgets what tp_model_init recorded");
    tp_text_add(&text, ".");
    free(lines);
    return tp_text_fail(&text, TP_VALUE, err);
}

static tp_merge_fill
missing_values(const tp_record *record, const tp_merge_facts *facts)
{
    const int64_t group = record == NULL ? 0 : record->group;
    tp_merge_fill fill = {.autotp_size = -1, .tp_size = -1};
    if (record != NULL && facts->autotp_size < 0)
        fill.autotp_size = record->tp_size;
    if (record != NULL && facts->tp_size < 0)
        fill.tp_size = record->tp_size;
    fill.tp_group = group != 0 && facts->tp_group == 0;
    fill.make_groups =
        group == 0 && facts->tp_group == 0 && !facts->has_mpu && !facts->has_mesh;
    return fill;
}

int
tp_merge(const tp_record *record, const tp_merge_facts *facts, tp_merge_fill *fill,
         tp_error *err)
{
    conflicts all = {.record = record, .facts = facts, .lines = TP_NO_TEXT};
    compare_sizes(&all);
    compare_groups(&all);
    compare_switches(&all);
    if (compare_dtype(&all, err) < 0) {
        tp_text_free(&all.lines);
        return -1;
    }
    if (all.count > 0)
        return report(&all, err);
    *fill = missing_values(record, facts);
    return 0;
}

const char *
tp_merge_precision(bool bf16, bool fp16)
{
    if (bf16)
        return "bfloat16";
    return fp16 ? "float16" : NULL;
}
