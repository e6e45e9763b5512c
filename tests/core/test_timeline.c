/* SPDX-License-Identifier: Apache-2.0 */
#include "cost/timeline.h"

#include "check.h"

static void
test_a_repeated_part_adds_up_and_its_moments_move_with_it(void)
{
    const tp_moment forward[] = {{30, 0}}, backward[] = {{5, 0}, {0, 4}};
    const tp_part parts[] = {{{10, 0}, forward, 1, 3}, {{-10, 4}, backward, 2, 3}};
    const tp_moment alone = tp_timeline_peak(parts, 2, 0);
    CHECK_INT_EQ(alone.live, 50); /* 10 + 10 + 30 */
    CHECK_INT_EQ(alone.gradients, 0);
    /* With ten times the gradients the end weighs more: 3 parts of 4, and 10 left
     * of 30. */
    const tp_moment weighted = tp_timeline_peak(parts, 2, 10);
    CHECK_INT_EQ(weighted.gradients, 12);
    CHECK_INT_EQ(weighted.live, 10);
}

static void
test_nothing_has_no_peak(void)
{
    const tp_moment peak = tp_timeline_peak(NULL, 0, 1);
    CHECK_INT_EQ(peak.live + peak.gradients, 0);
}

static int64_t
bytes_of(const tp_formula_sizes *sizes)
{
    tp_error err = TP_NO_ERROR;
    int64_t bytes = -1;
    CHECK_OK(tp_activation_formula(sizes, &bytes, &err), &err);
    return bytes;
}

static void
test_the_formula_is_the_published_one(void)
{
    tp_formula_sizes sizes = {
        .layers = 2, .tokens = 8, .hidden = 16, .ranks = 1, .itemsize = 2};
    const int64_t values = 2 * 8 * 16;
    CHECK_INT_EQ(bytes_of(&sizes), 34 * values);
    sizes.ranks = 4;
    CHECK_INT_EQ(bytes_of(&sizes), 16 * values);
    sizes.sequence_parallel = 1;
    CHECK_INT_EQ(bytes_of(&sizes), 34 * values / 4);
    sizes.itemsize = 4;
    CHECK_INT_EQ(bytes_of(&sizes), 34 * values / 2);
    sizes.checkpointing = 1;
    CHECK_INT_EQ(bytes_of(&sizes), 4 * values);
}

static void
test_sizes_that_have_no_formula_are_refused(void)
{
    const tp_formula_sizes fits = {
        .layers = 2, .tokens = 8, .hidden = 16, .ranks = 1, .itemsize = 2};
    tp_error err = TP_NO_ERROR;
    int64_t bytes = 0;
    tp_formula_sizes sizes = fits;
    sizes.ranks = 0;
    CHECK_FAILS(tp_activation_formula(&sizes, &bytes, &err), TP_VALUE, &err,
                "ranks and itemsize: 1 or more");
    sizes = fits;
    sizes.hidden = -16;
    CHECK_FAILS(tp_activation_formula(&sizes, &bytes, &err), TP_VALUE, &err,
                "expected 0 or more");
    sizes = fits;
    sizes.hidden = 0;
    CHECK_INT_EQ(bytes_of(&sizes), 0);
    sizes = fits;
    sizes.tokens = INT64_MAX / 100;
    CHECK_FAILS(tp_activation_formula(&sizes, &bytes, &err), TP_VALUE, &err,
                "2 layers of 92233720368547758 tokens of 16 features: 2^63 bytes");
}

static void
test_each_size_and_each_product_has_its_bound(void)
{
    enum { SIZES = 5 };
    static const struct {
        int64_t sizes[SIZES]; /* layers, tokens, hidden, ranks, itemsize */
        const char *part;
    } cases[] = {
        {{-1, 8, 16, 1, 2}, "expected 0 or more"},
        {{2, -8, 16, 1, 2}, "expected 0 or more"},
        {{2, 8, 16, 1, 0}, "1 or more"},
        {{INT64_MAX, 2, 1, 1, 2}, "9223372036854775807 layers of 2 tokens"},
        {{2, 2, INT64_MAX / 2, 1, 2}, "2^63 bytes or more"},
        {{1, 1, INT64_MAX / 33, 1, 1}, "2^63 bytes or more"},
        {{1, 1, INT64_MAX / 35, 1, 2}, "2^63 bytes or more"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const int64_t *at = cases[i].sizes;
        const tp_formula_sizes sizes = {.layers = at[0],
                                        .tokens = at[1],
                                        .hidden = at[2],
                                        .ranks = (int)at[3],
                                        .itemsize = (int)at[4]};
        tp_error err = TP_NO_ERROR;
        int64_t bytes = 0;
        CHECK_FAILS(tp_activation_formula(&sizes, &bytes, &err), TP_VALUE, &err,
                    cases[i].part);
    }
}

int
main(void)
{
    RUN(test_a_repeated_part_adds_up_and_its_moments_move_with_it);
    RUN(test_nothing_has_no_peak);
    RUN(test_the_formula_is_the_published_one);
    RUN(test_sizes_that_have_no_formula_are_refused);
    RUN(test_each_size_and_each_product_has_its_bound);
    return check_result();
}
