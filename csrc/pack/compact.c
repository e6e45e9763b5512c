/* SPDX-License-Identifier: Apache-2.0 */
/* compact.c -- which parts of a tensor can move at once when it is packed in place.
 *
 * The distance between a byte and its place grows from row to row, and with it what
 * may move at once: full rows, as many as fit between. Where the distance is short,
 * at the beginning, one block moves byte after byte. */
#include "pack/compact.h"

#include <stddef.h>
#include <string.h>

enum {
    /* What one block moves in some 20 us, a few launches' time. Fewer bytes than this
     * are not worth a step of their own. */
    kWorthAStep = 256 << 10
};

static int64_t
width_of(const tp_shard_view *view)
{
    int64_t width = 0;
    for (int64_t i = 1; i < view->values; i += 2)
        width += view->runs[i];
    return width;
}

int
tp_compact_check(const tp_shard_view *view, tp_error *err)
{
    for (int64_t i = 2; i < view->values; i += 2)
        if (view->runs[i] < view->runs[i - 2] + view->runs[i - 1])
            return tp_fail(err, TP_VALUE,
                           "run %lld (start %lld, length %lld) starts before the end "
                           "of the run before it; packing in place needs runs in "
                           "ascending order",
                           (long long)(i / 2), (long long)view->runs[i],
                           (long long)view->runs[i + 1]);
    return 0;
}

/* How many rows from `row` on can move at once: they end where row `row` begins to be
 * read. */
static int64_t
free_rows(const tp_shard_view *view, int64_t width, int64_t row)
{
    const int64_t rows = (row * view->size + view->runs[0]) / width - row;
    return rows < view->outer - row ? rows : view->outer - row;
}

/* The first row after `row` from which enough rows can move at once. */
static int64_t
row_worth_a_step(const tp_shard_view *view, int64_t width, int64_t row)
{
    const int64_t apart = view->size - width;
    const int64_t element = view->inner * view->item;
    const int64_t wanted = kWorthAStep / element + 2 * width - view->runs[0];
    if (apart == 0 || wanted / apart >= view->outer)
        return view->outer;
    const int64_t found = wanted <= 0 ? 0 : wanted / apart + 1;
    return found > row ? found : row + 1;
}

static void
make_rows(tp_compaction *at, int64_t last, int64_t row_bytes, tp_compact_step *step)
{
    const tp_shard_view *view = at->view;
    step->view = *view;
    step->view.outer = last - at->row;
    step->full = at->row * view->size * view->inner * view->item;
    step->shard = at->row * row_bytes;
    at->row = last;
}

/* A part of one run of a long row, as long as its distance to its place allows. */
static void
make_stretch(tp_compaction *at, int64_t row_bytes, tp_compact_step *step)
{
    const tp_shard_view *view = at->view;
    const int64_t element = view->inner * view->item;
    int64_t before = 0;
    for (int64_t i = 0; i < at->run; i++)
        before += view->runs[2 * i + 1] * element;
    step->full = (at->row * view->size + view->runs[2 * at->run]) * element + at->done;
    step->shard = at->row * row_bytes + before + at->done;
    const int64_t left = view->runs[2 * at->run + 1] * element - at->done;
    const int64_t apart = step->full - step->shard;
    step->in_order = apart > 0 && apart < left && apart < kWorthAStep;
    const int64_t bytes = apart == 0 || step->in_order || left < apart ? left : apart;
    step->stretch[0] = 0;
    step->stretch[1] = bytes;
    step->view = (tp_shard_view){1, bytes, 1, 1, step->stretch, 2};

    at->done += bytes;
    if (bytes == left) {
        at->done = 0;
        at->run++;
    }
    if (2 * at->run == view->values) {
        at->run = 0;
        at->row++;
    }
}

bool
tp_compact_next(tp_compaction *at, tp_compact_step *step)
{
    const tp_shard_view *view = at->view;
    const int64_t bytes = tp_shard_bytes(view);
    do {
        if (bytes == 0 || at->row >= view->outer)
            return false;
        const int64_t width = width_of(view);
        const int64_t row_bytes = bytes / view->outer;
        *step = (tp_compact_step){.in_order = false};
        if (at->run == 0 && at->done == 0) {
            const int64_t rows = free_rows(view, width, at->row);
            const bool ends = rows == view->outer - at->row;
            if (rows > 0 && (ends || rows * row_bytes >= kWorthAStep)) {
                make_rows(at, at->row + rows, row_bytes, step);
                return true;
            }
            if (row_bytes < kWorthAStep) {
                make_rows(at, row_worth_a_step(view, width, at->row), row_bytes, step);
                step->in_order = true;
                return true;
            }
        }
        make_stretch(at, row_bytes, step);
    } while (step->full == step->shard); /* in its place already */
    return true;
}

int
tp_compact_copies(const tp_compact_step *step, void *memory, tp_copies *list,
                  tp_error *err)
{
    const char *full = (const char *)memory + step->full;
    char *shard = (char *)memory + step->shard;
    if (!step->in_order)
        return tp_copies_pack(list, &step->view, full, shard, err);
    if (step->view.values == 2)
        return tp_copies_in_order(list, &step->view, full, shard, err);

    tp_shard_view row = step->view;
    row.outer = 1;
    for (int64_t i = 0; i < step->view.outer; i++) {
        if (tp_copies_in_order(list, &row, full, shard, err) < 0)
            return -1;
        full += row.size * row.inner * row.item;
        shard += tp_shard_bytes(&row);
    }
    return 0;
}

void
tp_compact_on_cpu(const tp_shard_view *view, void *memory)
{
    const int64_t element = view->inner * view->item;
    char *to = memory;
    for (int64_t row = 0; row < view->outer; row++)
        for (int64_t run = 0; run < view->values; run += 2) {
            const int64_t from = (row * view->size + view->runs[run]) * element;
            const size_t bytes = (size_t)(view->runs[run + 1] * element);
            memmove(to, (const char *)memory + from, bytes);
            to += bytes;
        }
}
