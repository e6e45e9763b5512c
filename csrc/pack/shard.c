/* SPDX-License-Identifier: Apache-2.0 */
/* shard.c -- the walk over the pieces of a shard.
 *
 * A piece is a stretch of bytes that is contiguous both in the shard and in the
 * full tensor: at most one run of one outer row. */
#define _DEFAULT_SOURCE /* madvise */

#include "pack/shard.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    kPage = 4096,      /* where pages are larger the kernel refuses the advice */
    kWindow = 2 << 20, /* one huge page; longer stretches are split */
    /* Above this malloc always maps new memory. Below, its memory may have
     * pages already, and looking for them takes as long as the copy. */
    kMapped = 32 << 20
};

static int
check_run(const tp_shard_view *view, int64_t run, int64_t *width, tp_error *err)
{
    const int64_t start = view->runs[2 * run];
    const int64_t length = view->runs[2 * run + 1];

    if (length <= 0)
        return tp_fail(
            err, TP_VALUE,
            "run %lld (start %lld, length %lld) is empty; the length of a run "
            "is at least 1",
            (long long)run, (long long)start, (long long)length);
    if (start < 0 || start > view->size || length > view->size - start)
        return tp_fail(err, TP_VALUE,
                       "run %lld (start %lld, length %lld) is outside the sharded "
                       "dimension of size %lld",
                       (long long)run, (long long)start, (long long)length,
                       (long long)view->size);
    if (__builtin_add_overflow(*width, length, width))
        return tp_fail(err, TP_VALUE,
                       "the lengths of the %lld runs sum to 2^63 or more",
                       (long long)(view->values / 2));
    return 0;
}

static bool
volume(int64_t outer, int64_t size, int64_t inner, int64_t *out)
{
    return !__builtin_mul_overflow(outer, size, out) &&
           !__builtin_mul_overflow(*out, inner, out);
}

int
tp_shard_check(const tp_shard_view *view, int64_t full_items, int64_t shard_items,
               tp_error *err)
{
    int64_t items = 0;
    if (view->outer < 0 || view->size < 0 || view->inner < 0 ||
        !volume(view->outer, view->size, view->inner, &items) || items != full_items)
        return tp_fail(err, TP_VALUE,
                       "the view (%lld, %lld, %lld) does not fit a full tensor of %lld "
                       "elements",
                       (long long)view->outer, (long long)view->size,
                       (long long)view->inner, (long long)full_items);
    if (view->values % 2 != 0)
        return tp_fail(err, TP_VALUE,
                       "runs have %lld values; expected pairs of start and length",
                       (long long)view->values);

    int64_t width = 0;
    for (int64_t run = 0; run < view->values / 2; run++)
        if (check_run(view, run, &width, err) < 0)
            return -1;
    if (!volume(view->outer, width, view->inner, &items) || items != shard_items)
        return tp_fail(
            err, TP_VALUE,
            "the runs select %lld of %lld along the sharded dimension, a shard "
            "of (%lld, %lld, %lld); the shard given has %lld elements",
            (long long)width, (long long)view->size, (long long)view->outer,
            (long long)width, (long long)view->inner, (long long)shard_items);
    return 0;
}

static int
by_start(const void *left, const void *right)
{
    const int64_t a = *(const int64_t *)left;
    const int64_t b = *(const int64_t *)right;
    return (a > b) - (a < b);
}

static int
check_ascending(const int64_t *runs, int64_t values, tp_error *err)
{
    for (int64_t i = 2; i < values; i += 2)
        if (runs[i] < runs[i - 2] + runs[i - 1])
            return tp_fail(err, TP_VALUE,
                           "the runs (start %lld, length %lld) and (start %lld, length "
                           "%lld) overlap; expected runs that share no element",
                           (long long)runs[i - 2], (long long)runs[i - 1],
                           (long long)runs[i], (long long)runs[i + 1]);
    return 0;
}

int
tp_shard_disjoint(const tp_shard_view *view, tp_error *err)
{
    const size_t bytes = (size_t)view->values * sizeof(*view->runs);
    if (bytes == 0)
        return 0;

    int64_t *sorted = malloc(bytes);
    if (sorted == NULL)
        return tp_fail_memory(err);
    memcpy(sorted, view->runs, bytes);
    qsort(sorted, (size_t)view->values / 2, 2 * sizeof(*sorted), by_start);
    const int result = check_ascending(sorted, view->values, err);
    free(sorted);
    return result;
}

static int64_t
row_bytes(const tp_shard_view *view)
{
    int64_t width = 0;
    for (int64_t i = 1; i < view->values; i += 2)
        width += view->runs[i];
    return width * view->inner * view->item;
}

int64_t
tp_shard_bytes(const tp_shard_view *view)
{
    return view->outer * row_bytes(view);
}

/* Advise the kernel about those units of `unit` bytes that are fully inside
 * the memory, so that nothing beside it is touched. A refusal changes nothing. */
static void
advise_inside(void *memory, int64_t bytes, int64_t unit, int advice)
{
    const int64_t skip = (unit - (int64_t)((uintptr_t)memory % (uintptr_t)unit)) % unit;
    const int64_t inside = bytes < skip ? 0 : (bytes - skip) / unit * unit;
    if (inside > 0)
        (void)madvise((char *)memory + skip, (size_t)inside, advice);
}

void
tp_shard_expect(void *memory, int64_t bytes)
{
#ifdef MADV_HUGEPAGE
    /* Filling new memory is bound by page faults; huge pages make 512 times fewer.
     * A small shard is not worth the split of its mapping. */
    if (bytes >= 4 * kWindow)
        advise_inside(memory, bytes, kWindow, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)bytes;
#endif
}

/* Have the pages of the next window made in one call, just before they are written
 * and while the kernel's zeros are still in the cache: a fault for each page costs
 * a fifth more time where there are no huge pages. */
static void
make_pages(void *memory, int64_t bytes)
{
#ifdef MADV_POPULATE_WRITE
    advise_inside(memory, bytes, kPage, MADV_POPULATE_WRITE);
#else
    (void)memory;
    (void)bytes;
#endif
}

/* Where a walk stands: inside `run` of outer row `row`, `done` bytes of that run
 * behind it. */
typedef struct {
    const tp_shard_view *view;
    int64_t row;
    int64_t run;
    int64_t done;
    int64_t at;  /* byte of the shard */
    int64_t end; /* the walk stops before this byte of the shard */
} tp_walk;

typedef struct {
    int64_t full;  /* byte of the full tensor */
    int64_t shard; /* byte of the shard */
    size_t bytes;
} tp_stretch;

static tp_walk
walk_from(const tp_shard_view *view, int64_t begin, int64_t end)
{
    tp_walk walk = {view, 0, 0, 0, begin, end};
    if (begin >= end)
        return walk;

    const int64_t row = row_bytes(view);
    const int64_t element = view->inner * view->item;
    walk.row = begin / row;
    walk.done = begin % row;
    while (walk.done >= view->runs[2 * walk.run + 1] * element)
        walk.done -= view->runs[2 * walk.run++ + 1] * element;
    return walk;
}

static bool
walk_next(tp_walk *walk, tp_stretch *out)
{
    if (walk->at >= walk->end)
        return false;

    const tp_shard_view *view = walk->view;
    const int64_t element = view->inner * view->item;
    const int64_t start = view->runs[2 * walk->run];
    const int64_t left = view->runs[2 * walk->run + 1] * element - walk->done;
    int64_t bytes = left < kWindow ? left : kWindow;
    if (bytes > walk->end - walk->at)
        bytes = walk->end - walk->at;
    out->full = (walk->row * view->size + start) * element + walk->done;
    out->shard = walk->at;
    out->bytes = (size_t)bytes;

    walk->at += bytes;
    walk->done += bytes;
    if (bytes < left)
        return true;
    walk->done = 0;
    walk->run++;
    if (2 * walk->run == view->values) {
        walk->run = 0;
        walk->row++;
    }
    return true;
}

void
tp_shard_pack(const tp_shard_view *view, const void *full, void *shard, int64_t begin,
              int64_t end)
{
    tp_walk walk = walk_from(view, begin, end);
    tp_stretch it;
    int64_t ready = tp_shard_bytes(view) > kMapped ? begin : end;
    while (walk_next(&walk, &it)) {
        /* A stretch is no longer than a window, so one more window is enough. */
        if (it.shard + (int64_t)it.bytes > ready) {
            const int64_t next = end - ready < kWindow ? end - ready : kWindow;
            make_pages((char *)shard + ready, next);
            ready += next;
        }
        memcpy((char *)shard + it.shard, (const char *)full + it.full, it.bytes);
    }
}

void
tp_shard_part(const tp_shard_view *view, const void *full, void *part, int64_t begin,
              int64_t end)
{
    tp_walk walk = walk_from(view, begin, end);
    tp_stretch it;
    while (walk_next(&walk, &it))
        memcpy((char *)part + (it.shard - begin), (const char *)full + it.full,
               it.bytes);
}

void
tp_shard_unpack(const tp_shard_view *view, void *full, const void *shard, int64_t begin,
                int64_t end)
{
    tp_walk walk = walk_from(view, begin, end);
    tp_stretch it;
    while (walk_next(&walk, &it))
        memcpy((char *)full + it.full, (const char *)shard + it.shard, it.bytes);
}

void
tp_shard_unpack_window(const tp_shard_view *view, void *window, const void *shard,
                       int64_t begin, int64_t end)
{
    const int64_t full_row = view->size * view->inner * view->item;
    const int64_t row = row_bytes(view);
    if (begin >= end || row == 0)
        return;

    tp_walk walk =
        walk_from(view, begin / full_row * row, ((end - 1) / full_row + 1) * row);
    tp_stretch it;
    while (walk_next(&walk, &it)) {
        const int64_t stop = it.full + (int64_t)it.bytes;
        const int64_t from = it.full > begin ? it.full : begin;
        const int64_t to = stop < end ? stop : end;
        if (from < to)
            memcpy((char *)window + (from - begin),
                   (const char *)shard + it.shard + (from - it.full),
                   (size_t)(to - from));
    }
}
