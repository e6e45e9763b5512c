/* SPDX-License-Identifier: Apache-2.0 */
/* read_plan.c -- in which order many boxes are read, and what of the files they span.
 */
#include "reads/read_plan.h"

#include <stdlib.h>

/* The reads of one box: where the first is, and how many there are. */
typedef struct {
    int file;
    int64_t begin;
    int64_t at;
    int64_t count;
} stretch;

static int
compare_stretches(const void *left, const void *right)
{
    const stretch *a = left, *b = right;
    if (a->file != b->file)
        return a->file < b->file ? -1 : 1;
    if (a->begin != b->begin)
        return a->begin < b->begin ? -1 : 1;
    return (a->at > b->at) - (a->at < b->at); /* qsort is not stable */
}

static int
compare_spans(const void *left, const void *right)
{
    const tp_span *a = left, *b = right;
    if (a->file != b->file)
        return a->file < b->file ? -1 : 1;
    return (a->begin > b->begin) - (a->begin < b->begin);
}

/* Put the reads of the boxes in the order of their first bytes. */
static int
sort_reads(stretch *stretches, int64_t count, tp_reads *reads, tp_error *err)
{
    tp_read *sorted = malloc((size_t)reads->count * sizeof(*sorted) + 1);
    if (sorted == NULL)
        return tp_fail_memory(err);
    qsort(stretches, (size_t)count, sizeof(*stretches), compare_stretches);
    int64_t at = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < stretches[i].count; k++)
            sorted[at++] = reads->items[stretches[i].at + k];
    free(reads->items);
    reads->items = sorted;
    reads->room = reads->count;
    return 0;
}

static int
find_spans(int64_t gap, tp_read_plan *plan, tp_error *err)
{
    const int64_t count = plan->reads.count;
    plan->spans = malloc((size_t)count * sizeof(*plan->spans) + 1);
    if (plan->spans == NULL)
        return tp_fail_memory(err);
    for (int64_t i = 0; i < count; i++) {
        const tp_read *read = &plan->reads.items[i];
        const int64_t end = read->begin + (read->rows - 1) * read->stride;
        plan->spans[i] = (tp_span){read->file, read->begin, end + read->row_bytes};
        if (__builtin_add_overflow(plan->bytes, read->rows * read->row_bytes,
                                   &plan->bytes))
            return tp_fail(err, TP_VALUE, "slices of 2^63 bytes or more in all");
    }
    qsort(plan->spans, (size_t)count, sizeof(*plan->spans), compare_spans);
    int64_t last = -1;
    for (int64_t i = 0; i < count; i++) {
        const tp_span span = plan->spans[i];
        tp_span *before = last < 0 ? NULL : &plan->spans[last];
        if (before == NULL || before->file != span.file ||
            span.begin - before->end > gap)
            plan->spans[++last] = span;
        else if (span.end > before->end)
            before->end = span.end;
    }
    plan->span_count = last + 1;
    return 0;
}

int
tp_read_plan_make(const tp_box *boxes, int count, int64_t gap, tp_read_plan *plan,
                  tp_error *err)
{
    int result = -1;
    int64_t used = 0;
    if (gap < 0)
        return tp_fail(err, TP_VALUE, "gap: got %lld bytes, expected 0 or more",
                       (long long)gap);
    stretch *stretches = malloc((size_t)count * sizeof(*stretches) + 1);
    if (stretches == NULL)
        return tp_fail_memory(err);
    for (int i = 0; i < count; i++) {
        const int64_t at = plan->reads.count;
        if (tp_box_reads(&boxes[i], i, &plan->reads, err) < 0)
            goto done;
        if (plan->reads.count > at)
            stretches[used++] = (stretch){boxes[i].file, plan->reads.items[at].begin,
                                          at, plan->reads.count - at};
    }
    if (sort_reads(stretches, used, &plan->reads, err) < 0 ||
        find_spans(gap, plan, err) < 0)
        goto done;
    result = 0;
done:
    free(stretches);
    return result;
}

void
tp_read_plan_clear(tp_read_plan *plan)
{
    tp_reads_clear(&plan->reads);
    free(plan->spans);
    *plan = (tp_read_plan)TP_NO_READ_PLAN;
}
