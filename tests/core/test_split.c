/* SPDX-License-Identifier: Apache-2.0 */
#include "layout/split.h"

#include "check.h"

#define MOST_RANKS 12

typedef struct {
    int64_t sum;
    int64_t least;
    int64_t most;
} summary;

static summary
summarise(const int64_t *widths, int ranks)
{
    summary s = {0, widths[0], widths[0]};
    for (int rank = 0; rank < ranks; rank++) {
        s.sum += widths[rank];
        s.least = widths[rank] < s.least ? widths[rank] : s.least;
        s.most = widths[rank] > s.most ? widths[rank] : s.most;
    }
    return s;
}

static void
test_widths_are_full_units_that_sum_to_the_size_and_fall(void)
{
    tp_error err = TP_NO_ERROR;
    int64_t widths[MOST_RANKS];
    for (int64_t unit = 1; unit <= 5; unit++)
        for (int64_t units = 0; units <= 40; units++)
            for (int ranks = 1; ranks <= MOST_RANKS; ranks++) {
                if (!CHECK_OK(tp_split(unit * units, unit, ranks, widths, &err), &err))
                    return;
                const summary s = summarise(widths, ranks);
                CHECK_INT_EQ(s.sum, unit * units);
                CHECK(s.most - s.least <= unit);
                for (int rank = 0; rank < ranks; rank++) {
                    CHECK_INT_EQ(widths[rank] % unit, 0);
                    CHECK(rank == 0 || widths[rank] <= widths[rank - 1]);
                }
            }
}

static void
test_a_width_is_zero_when_ranks_exceed_units(void)
{
    tp_error err = TP_NO_ERROR;
    int64_t widths[4];
    CHECK_OK(tp_split(128, 64, 4, widths, &err), &err);
    CHECK_INT_EQ(widths[1], 64);
    CHECK_INT_EQ(widths[2], 0);
    CHECK_INT_EQ(widths[3], 0);
}

static void
test_what_cannot_be_sharded_is_refused_with_its_sizes(void)
{
    tp_error err = TP_NO_ERROR;
    int64_t widths[4];
    CHECK_FAILS(tp_split(97, 32, 2, widths, &err), TP_VALUE, &err,
                "size 97 is not a multiple of unit 32");
    CHECK_FAILS(tp_split(-4, 2, 2, widths, &err), TP_VALUE, &err, "size -4");
    CHECK_FAILS(tp_split(4, 0, 2, widths, &err), TP_VALUE, &err, "units of 0");
    CHECK_FAILS(tp_split(4, 1, 0, widths, &err), TP_VALUE, &err, "over 0 ranks");
    CHECK_FAILS(tp_split_grain(4, 0, 2, widths, &err), TP_VALUE, &err, "grains of 0");
    CHECK_FAILS(tp_split_grain(4, 1, -1, widths, &err), TP_VALUE, &err, "-1 ranks");
    CHECK_FAILS(tp_split_grain(3, 1, 4, widths, &err), TP_VALUE, &err,
                "size 3 cannot be sharded over 4 ranks");
}

static void
test_the_largest_sizes_do_not_overflow(void)
{
    tp_error err = TP_NO_ERROR;
    int64_t widths[3];
    CHECK_OK(tp_split(INT64_MAX, 1, 3, widths, &err), &err);
    CHECK(widths[0] + widths[1] + widths[2] == INT64_MAX);
    CHECK_OK(tp_split_grain(INT64_MAX, INT64_MAX, 3, widths, &err), &err);
    CHECK(widths[0] + widths[1] + widths[2] == INT64_MAX);
}

static void
test_grained_widths_sum_to_the_size_and_every_rank_gets_one(void)
{
    tp_error err = TP_NO_ERROR;
    int64_t widths[MOST_RANKS];
    for (int64_t grain = 1; grain <= 70; grain += 3)
        for (int ranks = 1; ranks <= MOST_RANKS; ranks++)
            for (int64_t size = ranks; size <= 150; size++) {
                if (!CHECK_OK(tp_split_grain(size, grain, ranks, widths, &err), &err))
                    return;
                const summary s = summarise(widths, ranks);
                const int64_t unit = tp_split_fit(size, grain, ranks);
                CHECK_INT_EQ(s.sum, size);
                CHECK(s.least > 0);
                CHECK(s.most - s.least <= unit);
                for (int rank = 0; rank < ranks - 1; rank++)
                    CHECK_INT_EQ(widths[rank] % unit, 0);
                CHECK_INT_EQ(widths[ranks - 1] % unit, size % unit);
            }
}

static void
test_a_unit_fits_when_every_rank_gets_one_and_is_the_largest_half_that_does(void)
{
    for (int64_t unit = 1; unit <= 70; unit++)
        for (int ranks = 1; ranks <= MOST_RANKS; ranks++)
            for (int64_t size = 0; size <= 150; size++) {
                const int64_t fit = tp_split_fit(size, unit, ranks);
                CHECK(fit == 1 || size / fit >= ranks);
                int64_t larger = unit;
                while (larger > fit) {
                    CHECK(size / larger < ranks);
                    larger /= 2;
                }
                CHECK_INT_EQ(larger, fit);
            }
}

static void
test_a_grain_that_divides_is_kept_and_the_rest_goes_last(void)
{
    tp_error err = TP_NO_ERROR;
    int64_t widths[3];
    CHECK_OK(tp_split_grain(256, 64, 3, widths, &err), &err);
    CHECK_INT_EQ(widths[0], 128);
    CHECK_INT_EQ(widths[1], 64);
    CHECK_INT_EQ(widths[2], 64);
    CHECK_OK(tp_split_grain(205, 64, 3, widths, &err), &err);
    CHECK_INT_EQ(widths[0], 64);
    CHECK_INT_EQ(widths[1], 64);
    CHECK_INT_EQ(widths[2], 77);
}

static void
test_a_grain_is_halved_until_every_rank_gets_one(void)
{
    tp_error err = TP_NO_ERROR;
    int64_t widths[4];
    CHECK_OK(tp_split_grain(100, 64, 4, widths, &err), &err);
    CHECK_INT_EQ(widths[0], 32);
    CHECK_INT_EQ(widths[1], 32);
    CHECK_INT_EQ(widths[2], 16);
    CHECK_INT_EQ(widths[3], 20);
}

int
main(void)
{
    RUN(test_widths_are_full_units_that_sum_to_the_size_and_fall);
    RUN(test_a_width_is_zero_when_ranks_exceed_units);
    RUN(test_what_cannot_be_sharded_is_refused_with_its_sizes);
    RUN(test_the_largest_sizes_do_not_overflow);
    RUN(test_grained_widths_sum_to_the_size_and_every_rank_gets_one);
    RUN(test_a_unit_fits_when_every_rank_gets_one_and_is_the_largest_half_that_does);
    RUN(test_a_grain_that_divides_is_kept_and_the_rest_goes_last);
    RUN(test_a_grain_is_halved_until_every_rank_gets_one);
    return check_result();
}
