/* SPDX-License-Identifier: Apache-2.0 */
#include "pack/compact.h"

#include "copy_on_cpu.h"

static const int64_t kFirst[] = {0, 256};
static const int64_t kThird[] = {512, 256};
static const int64_t kFused[] = {0, 64, 256, 64, 512, 64};
static const int64_t kAlmost[] = {1, 1023};
static const int64_t kUneven[] = {0, 700, 701, 300};
static const int64_t kWhole[] = {0, 1024};

static const tp_shard_view kViews[] = {
    {1, 1024, 512, 2, kFirst, 2},  {1, 1024, 512, 2, kThird, 2},
    {512, 1024, 1, 2, kFirst, 2},  {512, 1024, 1, 4, kThird, 2},
    {1, 768, 3000, 2, kFused, 6},  {300, 768, 1, 2, kFused, 6},
    {900, 1024, 1, 1, kAlmost, 2}, {1, 1024, 999, 2, kAlmost, 2},
    {3, 1024, 400, 2, kUneven, 4}, {700, 1024, 1, 3, kUneven, 4},
    {7, 1024, 5, 2, kWhole, 2},    {2, 1024, 600, 1, kThird, 2},
};

enum { VIEWS = sizeof(kViews) / sizeof(*kViews) };

/* Run the steps on a CPU. A step in order is one block, tile after tile; any other
 * has its tiles in an order of its own. */
static int64_t
compact(const tp_shard_view *view, unsigned char *memory, unsigned seed)
{
    tp_compaction at = {.view = view};
    tp_compact_step step;
    int64_t steps = 0;
    while (tp_compact_next(&at, &step) && steps < 10000) {
        tp_error err = TP_NO_ERROR;
        tp_copies list = TP_NO_COPIES;
        CHECK_OK(
            (tp_copies_clear(&list), tp_compact_copies(&step, memory, &list, &err)),
            &err);
        start_on_cpu(list.items, list.count, 500, step.in_order ? 0 : seed);
        tp_copies_clear(&list);
        steps++;
    }
    return steps;
}

static void
test_steps_leave_the_shard_at_the_front(void)
{
    for (int i = 0; i < VIEWS; i++)
        for (unsigned seed = 1; seed < 30; seed += 13) {
            const tp_shard_view *view = &kViews[i];
            const int64_t bytes = view->outer * view->size * view->inner * view->item;
            const int64_t shard = tp_shard_bytes(view);
            unsigned char *full = malloc((size_t)bytes);
            unsigned char *want = malloc((size_t)shard);
            unsigned char *on_cpu = malloc((size_t)bytes);
            for (int64_t k = 0; k < bytes; k++)
                full[k] = (unsigned char)(k % 249 + k / 70001);
            memcpy(on_cpu, full, (size_t)bytes);
            tp_shard_pack(view, full, want, 0, shard);
            tp_compact_on_cpu(view, on_cpu);
            compact(view, full, seed);
            if (!CHECK(memcmp(on_cpu, want, (size_t)shard) == 0) ||
                !CHECK(memcmp(full, want, (size_t)shard) == 0))
                fprintf(stderr, "view %d, seed %u\n", i, seed);
            free(full);
            free(want);
            free(on_cpu);
        }
}

/* The steps alone, of a tensor that is not there. */
static int64_t
count_steps(const tp_shard_view *view, int64_t *in_order)
{
    tp_compaction at = {.view = view};
    tp_compact_step step;
    int64_t steps = 0;
    *in_order = 0;
    while (tp_compact_next(&at, &step)) {
        steps++;
        *in_order += step.in_order ? tp_shard_bytes(&step.view) : 0;
    }
    return steps;
}

static void
test_few_steps_move_a_large_weight(void)
{
    int64_t in_order = 0;
    const int64_t rank1[] = {7168, 7168};
    const int64_t rank0[] = {0, 7168};
    /* A column view of the rank behind the first is one copy, and that of the first is
     * in its place. */
    const tp_shard_view column1 = {1, 28672, 8192, 2, rank1, 2};
    const tp_shard_view column0 = {1, 28672, 8192, 2, rank0, 2};
    CHECK_INT_EQ(count_steps(&column1, &in_order), 1);
    CHECK_INT_EQ(in_order, 0);
    CHECK_INT_EQ(count_steps(&column0, &in_order), 0);
    /* A row view over four ranks: each step moves three times what lies before it. */
    const tp_shard_view row = {8192, 28672, 1, 2, rank0, 2};
    CHECK(count_steps(&row, &in_order) <= 8);
    CHECK(in_order <= 1 << 20);
    /* A fused column weight moves its second and third piece, each at once. */
    const int64_t fused[] = {0, 2048, 8192, 2048, 16384, 2048};
    const tp_shard_view qkv = {1, 24576, 8192, 2, fused, 6};
    CHECK_INT_EQ(count_steps(&qkv, &in_order), 2);
    CHECK_INT_EQ(in_order, 0);
}

static void
test_runs_that_do_not_ascend_are_refused(void)
{
    const int64_t runs[] = {4, 4, 0, 2};
    const tp_shard_view view = {1, 16, 1, 2, runs, 4};
    tp_error err = TP_NO_ERROR;
    CHECK_FAILS(tp_compact_check(&view, &err), TP_VALUE, &err,
                "run 1 (start 0, length 2) starts before the end of the run before it");
    CHECK_OK(tp_compact_check(&kViews[4], &err), &err);
}

int
main(void)
{
    RUN(test_steps_leave_the_shard_at_the_front);
    RUN(test_few_steps_move_a_large_weight);
    RUN(test_runs_that_do_not_ascend_are_refused);
    return check_result();
}
