/* SPDX-License-Identifier: Apache-2.0 */
#include "pack/shard.h"

#include <stdlib.h>

#include "check.h"

enum { OUTER = 3, SIZE = 10, INNER = 2, ITEM = 3, FULL = OUTER * SIZE * INNER * ITEM };

static const int64_t kRuns[] = {7, 2, 0, 1, 3, 3};

static tp_shard_view
make_view(const int64_t *runs, int64_t values)
{
    const tp_shard_view view = {OUTER, SIZE, INNER, ITEM, runs, values};
    return view;
}

/* One byte at a time, from the definition: the shard is the runs, in order. */
static int64_t
reference_pack(const tp_shard_view *view, const unsigned char *full,
               unsigned char *shard)
{
    const int64_t element = view->inner * view->item;
    int64_t at = 0;
    for (int64_t row = 0; row < view->outer; row++)
        for (int64_t run = 0; run < view->values; run += 2)
            for (int64_t byte = 0; byte < view->runs[run + 1] * element; byte++)
                shard[at++] =
                    full[(row * view->size + view->runs[run]) * element + byte];
    return at;
}

static void
fill(unsigned char *bytes, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        bytes[i] = (unsigned char)(i % 251 + 1);
}

static void
test_every_range_of_bytes_packs_the_same_shard(void)
{
    const tp_shard_view view = make_view(kRuns, 6);
    unsigned char full[FULL];
    unsigned char want[FULL];
    fill(full, FULL);
    const int64_t bytes = reference_pack(&view, full, want);
    CHECK_INT_EQ(tp_shard_bytes(&view), bytes);

    for (int64_t step = 1; step <= bytes; step++) {
        unsigned char got[FULL] = {0};
        for (int64_t begin = 0; begin < bytes; begin += step)
            tp_shard_pack(&view, full, got, begin,
                          begin + step < bytes ? begin + step : bytes);
        CHECK(memcmp(got, want, (size_t)bytes) == 0);
        CHECK_INT_EQ(got[bytes], 0);
    }
}

static void
test_every_range_of_bytes_unpacks_into_the_runs_and_nowhere_else(void)
{
    const tp_shard_view view = make_view(kRuns, 6);
    unsigned char full[FULL];
    unsigned char shard[FULL];
    fill(full, FULL);
    const int64_t bytes = reference_pack(&view, full, shard);

    unsigned char want[FULL];
    for (int64_t i = 0; i < FULL; i++) {
        const int64_t at = i / (INNER * ITEM) % SIZE;
        const bool inside = at == 0 || (at >= 3 && at < 6) || at == 7 || at == 8;
        want[i] = inside ? full[i] : 0;
    }
    for (int64_t step = 1; step <= bytes; step++) {
        unsigned char got[FULL] = {0};
        for (int64_t begin = 0; begin < bytes; begin += step)
            tp_shard_unpack(&view, got, shard, begin,
                            begin + step < bytes ? begin + step : bytes);
        CHECK(memcmp(got, want, FULL) == 0);
    }
}

static void
test_every_window_of_the_full_tensor_gets_its_bytes_of_the_shard(void)
{
    const tp_shard_view view = make_view(kRuns, 6);
    unsigned char full[FULL];
    unsigned char shard[FULL];
    unsigned char want[FULL] = {0};
    fill(full, FULL);
    tp_shard_unpack(&view, want, shard, 0, reference_pack(&view, full, shard));

    for (int64_t begin = 0; begin <= FULL; begin++)
        for (int64_t end = begin; end <= FULL; end += 7) {
            unsigned char got[FULL] = {0};
            tp_shard_unpack_window(&view, got, shard, begin, end);
            CHECK(memcmp(got, want + begin, (size_t)(end - begin)) == 0);
            for (int64_t i = end - begin; i < FULL; i++)
                CHECK_INT_EQ(got[i], 0);
        }
    const tp_shard_view no_rows = {0, 4, 5, 8, kRuns, 0};
    tp_shard_unpack_window(&no_rows, NULL, NULL, 0, 0);
}

static void
test_a_view_without_elements_has_no_bytes_and_copies_nothing(void)
{
    const int64_t runs[] = {0, 4};
    const tp_shard_view no_rows = {0, 4, 5, 8, runs, 2};
    const tp_shard_view no_columns = {3, 4, 0, 8, runs, 2};
    const tp_shard_view no_runs = {3, 4, 5, 8, NULL, 0};
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_shard_check(&no_rows, 0, 0, &err), &err);
    CHECK_OK(tp_shard_check(&no_columns, 0, 0, &err), &err);
    CHECK_OK(tp_shard_check(&no_runs, 60, 0, &err), &err);
    CHECK_OK(tp_shard_disjoint(&no_runs, &err), &err);
    CHECK_INT_EQ(tp_shard_bytes(&no_rows), 0);
    CHECK_INT_EQ(tp_shard_bytes(&no_columns), 0);
    CHECK_INT_EQ(tp_shard_bytes(&no_runs), 0);
    tp_shard_pack(&no_rows, NULL, NULL, 0, 0);
    tp_shard_unpack(&no_columns, NULL, NULL, 0, 0);
}

static void
test_a_run_outside_the_dimension_is_named_with_the_size(void)
{
    const int64_t outside[][4] = {{0, 1, 9, 2},         {0, 1, -1, 2},
                                  {0, 1, 11, 1},        {0, 1, 10, 1},
                                  {0, 1, INT64_MAX, 1}, {0, 1, 1, INT64_MAX}};
    for (size_t i = 0; i < sizeof(outside) / sizeof(*outside); i++) {
        const tp_shard_view view = make_view(outside[i], 4);
        tp_error err = TP_NO_ERROR;
        CHECK_INT_EQ(tp_shard_check(&view, 60, 18, &err), -1);
        CHECK_INT_EQ(err.code, TP_VALUE);
        CHECK_TEXT_HAS(tp_error_text(&err), "run 1 (start ");
        CHECK_TEXT_HAS(tp_error_text(&err), "size 10");
        tp_error_clear(&err);
    }
}

static void
test_an_empty_run_and_a_lone_value_are_refused(void)
{
    const int64_t empty[] = {4, 0};
    const tp_shard_view view = make_view(empty, 2);
    const tp_shard_view lone = make_view(kRuns, 3);
    tp_error err = TP_NO_ERROR;
    CHECK_FAILS(tp_shard_check(&view, 60, 0, &err), TP_VALUE, &err, "is empty");
    CHECK_FAILS(tp_shard_check(&lone, 60, 12, &err), TP_VALUE, &err, "3 values");
}

static void
test_sizes_that_do_not_fit_together_are_refused(void)
{
    const tp_shard_view view = make_view(kRuns, 6);
    tp_shard_view negative = view;
    tp_shard_view huge = view;
    negative.outer = negative.size = -1;
    huge.outer = huge.size = huge.inner = INT64_C(1) << 40;
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_shard_check(&view, 60, 36, &err), &err);
    CHECK_FAILS(tp_shard_check(&view, 61, 36, &err), TP_VALUE, &err, "61 elements");
    CHECK_FAILS(tp_shard_check(&view, 60, 35, &err), TP_VALUE, &err, "35 elements");
    CHECK_FAILS(tp_shard_check(&negative, 2, 36, &err), TP_VALUE, &err, "(-1, -1, 2)");
    CHECK_FAILS(tp_shard_check(&huge, 0, 0, &err), TP_VALUE, &err, "does not fit");
}

static void
test_sizes_beyond_32_bits_are_exact(void)
{
    const int64_t half = INT64_C(5) << 32;
    const int64_t runs[] = {half, half};
    const tp_shard_view view = {1, 2 * half, 1, 4, runs, 2};
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_shard_check(&view, 2 * half, half, &err), &err);
    CHECK_INT_EQ(tp_shard_bytes(&view), 4 * half);
}

static void
test_runs_are_disjoint_in_any_order_unless_they_share_an_element(void)
{
    const int64_t shared[] = {7, 2, 0, 1, 8, 1};
    const int64_t same[] = {3, 1, 3, 1};
    const tp_shard_view good = make_view(kRuns, 6);
    const tp_shard_view bad = make_view(shared, 6);
    const tp_shard_view twice = make_view(same, 4);
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_shard_disjoint(&good, &err), &err);
    CHECK_FAILS(tp_shard_disjoint(&bad, &err), TP_VALUE, &err,
                "(start 7, length 2) and (start 8, length 1) overlap");
    CHECK_FAILS(tp_shard_disjoint(&twice, &err), TP_VALUE, &err, "overlap");
}

static void
test_expecting_a_write_keeps_the_memory_and_its_contents(void)
{
    const size_t bytes = (size_t)20 << 20;
    unsigned char *memory = malloc(bytes);
    if (!CHECK(memory != NULL))
        return;
    memset(memory, 7, bytes);
    for (size_t offset = 0; offset < 3; offset++)
        tp_shard_expect(memory + offset, (int64_t)(bytes - offset));
    tp_shard_expect(memory, 0);
    CHECK(memory[0] == 7 && memcmp(memory, memory + 1, bytes - 1) == 0);
    free(memory);
}

int
main(void)
{
    RUN(test_every_range_of_bytes_packs_the_same_shard);
    RUN(test_every_range_of_bytes_unpacks_into_the_runs_and_nowhere_else);
    RUN(test_every_window_of_the_full_tensor_gets_its_bytes_of_the_shard);
    RUN(test_a_view_without_elements_has_no_bytes_and_copies_nothing);
    RUN(test_a_run_outside_the_dimension_is_named_with_the_size);
    RUN(test_an_empty_run_and_a_lone_value_are_refused);
    RUN(test_sizes_that_do_not_fit_together_are_refused);
    RUN(test_sizes_beyond_32_bits_are_exact);
    RUN(test_runs_are_disjoint_in_any_order_unless_they_share_an_element);
    RUN(test_expecting_a_write_keeps_the_memory_and_its_contents);
    return check_result();
}
