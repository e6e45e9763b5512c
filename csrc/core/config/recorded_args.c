/* SPDX-License-Identifier: Apache-2.0 */
/* recorded_args.c -- the arguments that tp_model_init recorded. */
#include "config/recorded_args.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/text.h"

typedef struct {
    int64_t key;
    tp_record record;
} slot;

struct tp_records {
    slot *slots; /* owned; oldest first */
    int count;
    int room;
};

int
tp_records_new(tp_records **out, tp_error *err)
{
    *out = calloc(1, sizeof(**out));
    return *out == NULL ? tp_fail_memory(err) : 0;
}

static int
check_record(const tp_record *record, tp_error *err)
{
    if (record->tp_size < 1)
        return tp_fail(err, TP_VALUE,
                       "tp_model_init: tp_size is %" PRId64
                       ", but it must be at least 1",
                       record->tp_size);
    if (record->group_size > 0 && record->group_size != record->tp_size)
        return tp_fail(
            err, TP_VALUE,
            "tp_model_init: tp_group has %" PRId64 " rank%s, but tp_size is %" PRId64
            "; pass a group of tp_size ranks or the group's size as tp_size",
            record->group_size, record->group_size == 1 ? "" : "s", record->tp_size);
    return 0;
}

static void
add_group(tp_text *text, int64_t group)
{
    if (group == 0)
        tp_text_add(text, "no group");
    else
        tp_text_add(text, "the group 0x%" PRIx64, (uint64_t)group);
}

/* One line per argument that differs. */
static void
add_differences(tp_text *text, const tp_record *now, const tp_record *before)
{
    if (now->tp_size != before->tp_size)
        tp_text_add(text, "\n  - tp_size: %" PRId64 " now, but %" PRId64 " before",
                    now->tp_size, before->tp_size);
    if (strcmp(now->dtype, before->dtype) != 0)
        tp_text_add(text, "\n  - dtype: %s now, but %s before", now->dtype,
                    before->dtype);
    if (now->group != before->group) {
        tp_text_add(text, "\n  - tp_group: ");
        add_group(text, now->group);
        tp_text_add(text, " now, but ");
        add_group(text, before->group);
        tp_text_add(text, " before");
    } else if (now->group_size != before->group_size && now->group_size > 0 &&
               before->group_size > 0) {
        tp_text_add(text,
                    "\n  - ranks of tp_group: %" PRId64 " now, but %" PRId64 " before",
                    now->group_size, before->group_size);
    }
}

static int
check_against(const tp_record *now, const tp_record *before, tp_error *err)
{
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text,
                "Conflicting tp_model_init arguments: they differ from those of an "
                "earlier call "
                "whose model is still alive:");
    const size_t headline = text.size;
    add_differences(&text, now, before);
    if (!text.failed && text.size == headline) {
        tp_text_free(&text);
        return 0;
    }
    tp_text_add(&text,
                "\nPass the same arguments, or call deepspeed_autotp.reset() to forget "
                "the earlier ones.");
    return tp_text_fail(&text, TP_VALUE, err);
}

static int
reserve(tp_records *records, tp_error *err)
{
    if (records->count < records->room)
        return 0;
    const int room = records->room == 0 ? 4 : records->room * 2;
    slot *grown = realloc(records->slots, (size_t)room * sizeof(*grown));
    if (grown == NULL)
        return tp_fail_memory(err);
    records->slots = grown;
    records->room = room;
    return 0;
}

int
tp_records_add(tp_records *records, int64_t key, const tp_record *record, tp_error *err)
{
    if (check_record(record, err) < 0)
        return -1;
    for (int i = 0; i < records->count; i++) {
        if (check_against(record, &records->slots[i].record, err) < 0)
            return -1;
    }
    /* A copy, because `record` may point into the list, which is about to move. */
    const slot added = {key, *record};
    if (reserve(records, err) < 0)
        return -1;
    tp_records_remove(records, key); /* so that the key becomes the latest */
    records->slots[records->count++] = added;
    return 0;
}

static int
index_of(const tp_records *records, int64_t key)
{
    for (int i = 0; i < records->count; i++) {
        if (records->slots[i].key == key)
            return i;
    }
    return -1;
}

const tp_record *
tp_records_find(const tp_records *records, int64_t key)
{
    const int index = index_of(records, key);
    return index < 0 ? NULL : &records->slots[index].record;
}

const tp_record *
tp_records_latest(const tp_records *records, int64_t *key)
{
    if (records->count == 0)
        return NULL;
    const slot *last = &records->slots[records->count - 1];
    *key = last->key;
    return &last->record;
}

int
tp_records_count(const tp_records *records)
{
    return records->count;
}

void
tp_records_remove(tp_records *records, int64_t key)
{
    const int index = index_of(records, key);
    if (index < 0)
        return;
    slot *gap = &records->slots[index];
    const int behind = records->count - index - 1;
    memmove(gap, gap + 1, (size_t)behind * sizeof(*gap));
    records->count--;
}

void
tp_records_clear(tp_records *records)
{
    records->count = 0;
}

void
tp_records_free(tp_records *records)
{
    if (records == NULL)
        return;
    free(records->slots);
    free(records);
}
