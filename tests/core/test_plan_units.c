/* SPDX-License-Identifier: Apache-2.0 */
/* Widths of features in units of 16 bytes. */
#include "plan_fixture.h"

enum { EXPERTS = 3, HIDDEN = 8 };

/* "32|32|36": the elements of each rank along the sharded dimension, as its local shape
 * has them. Holds until the next call. */
static const char *
widths_of(const fixture *f, const char *name)
{
    static char text[256];
    const tp_entry *entry = entry_of(f, name);
    size_t used = 0;
    text[0] = '\0';
    for (int rank = 0; rank < tp_plan_ranks(f->plan); rank++) {
        int64_t shape[TP_MAX_DIMS];
        tp_plan_local_shape(f->plan, entry->parameter, rank, shape);
        used += (size_t)snprintf(text + used, sizeof(text) - used, "%s%lld",
                                 rank > 0 ? "|" : "",
                                 (long long)shape[entry->dim < 0 ? 0 : entry->dim]);
    }
    return text;
}

/* A column and a row layer of `size` features between them. */
static void
add_pair(fixture *f, int size)
{
    add_module(f, "", TP_MODULE_OTHER, 0);
    add_linear(f, "up", size, HIDDEN);
    add_linear(f, "down", HIDDEN, size);
    add_rule(f, "up", "up$", TP_PARTITION_COLUMN);
    add_rule(f, "down", "down$", TP_PARTITION_ROW);
}

/* Experts that a plan of transformers shards, of `size` features between their layers.
 */
static void
add_experts(fixture *f, int size)
{
    add_module(f, "", TP_MODULE_OTHER, 0);
    const int module = add_module(f, "experts", TP_MODULE_OTHER, 0);
    add_shaped(f, module, "gate_up_proj", 3,
               (int64_t[]){EXPERTS, 2 * (int64_t)size, HIDDEN}, -1);
    add_shaped(f, module, "gate_up_proj_bias", 2,
               (int64_t[]){EXPERTS, 2 * (int64_t)size}, -1);
    add_shaped(f, module, "down_proj", 3, (int64_t[]){EXPERTS, HIDDEN, size}, -1);
    add_style(f, "experts.gate_up_proj", "packed_colwise");
    add_style(f, "experts.down_proj", "rowwise");
    add_style(f, "experts", "moe_tp_experts");
}

static void
check_pair(int size, int ranks, int64_t grain, int itemsize, const char *widths)
{
    fixture f = fixture_new(ranks);
    f.options.grain = grain;
    f.itemsize = itemsize;
    add_pair(&f, size);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(widths_of(&f, "up.weight"), widths);
        CHECK_TEXT_EQ(widths_of(&f, "down.weight"), widths);
    }
    fixture_free(&f);
}

static void
check_experts(int size, int ranks, int itemsize, const char *inner, const char *both)
{
    fixture f = fixture_new(ranks);
    f.itemsize = itemsize;
    add_experts(&f, size);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(widths_of(&f, "experts.down_proj"), inner);
        CHECK_TEXT_EQ(widths_of(&f, "experts.gate_up_proj"), both);
        CHECK_TEXT_EQ(widths_of(&f, "experts.gate_up_proj_bias"), both);
    }
    fixture_free(&f);
}

static void
test_features_that_do_not_divide_are_sharded_in_units_of_16_bytes(void)
{
    check_pair(96, 5, 1, 2, "24|24|16|16|16");
    check_pair(100, 3, 1, 2, "32|32|36"); /* what is left over goes to the last */
    check_pair(96, 5, 1, 1, "32|16|16|16|16");
}

static void
test_wide_elements_are_sharded_as_those_of_16_bits_which_they_may_become(void)
{
    check_pair(96, 5, 1, 4, "24|24|16|16|16");
    check_pair(96, 5, 1, 8, "24|24|16|16|16");
}

static void
test_features_that_divide_stay_equal(void)
{
    check_pair(12, 2, 1, 2, "6|6");
    check_pair(100, 4, 1, 2, "25|25|25|25");
    check_pair(96, 4, 24, 2, "24|24|24|24");
}

static void
test_a_grain_and_16_bytes_hold_together(void)
{
    check_pair(264, 5, 12, 2, "72|48|48|48|48");
    check_pair(264, 5, 12, 1, "48|48|48|48|72");
    check_pair(448, 3, 64, 2, "192|128|128");
}

static void
test_no_rank_is_without_features_where_units_are_too_large(void)
{
    check_pair(20, 3, 1, 2, "8|8|4"); /* units of 4 */
    check_pair(5, 3, 1, 2, "2|2|1");
    check_pair(7, 5, 64, 1, "2|2|1|1|1");
}

static void
test_experts_are_in_units_also_where_they_divide(void)
{
    check_experts(24, 2, 2, "16|8", "32|16");
    check_experts(32, 3, 4, "16|8|8", "32|16|16");
    check_experts(12, 2, 2, "6|6", "12|12"); /* too few for a unit each */
    check_experts(32, 2, 1, "16|16", "32|32");
}

/* Factors of an adapter may have more bytes than the layer beside them. */
static void
test_the_smallest_element_decides_for_the_whole_model(void)
{
    fixture f = fixture_new(3);
    f.itemsize = 4;
    add_pair(&f, 100);
    f.itemsize = 1;
    add_linear(&f, "other", HIDDEN, HIDDEN);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(widths_of(&f, "up.weight"), "32|32|36");
        CHECK_TEXT_EQ(widths_of(&f, "down.weight"), "32|32|36");
    }
    fixture_free(&f);
}

/* A gate and what it gates, taking turns, are as many on a rank as it takes. */
static void
test_pairs_that_take_turns_fit_the_row_layer_at_any_grain(void)
{
    for (int64_t grain = 1; grain <= 9; grain++)
        for (int size = 5; size <= 60; size++) {
            fixture f = fixture_new(5);
            f.options.grain = grain;
            add_module(&f, "", TP_MODULE_OTHER, 0);
            const int module = add_module(&f, "experts", TP_MODULE_OTHER, 0);
            add_shaped(&f, module, "gate_up_proj", 3,
                       (int64_t[]){EXPERTS, HIDDEN, 2 * (int64_t)size}, -1);
            add_shaped(&f, module, "down_proj", 3, (int64_t[]){EXPERTS, size, HIDDEN},
                       -1);
            add_rule(&f, "up", ".*gate_up_proj$", TP_PARTITION_ROW);
            add_rule(&f, "down", ".*down_proj$", TP_PARTITION_COLUMN);
            if (make_plan(&f)) {
                const tp_layout *pairs = entry_of(&f, "experts.gate_up_proj")->layout;
                const tp_layout *row = entry_of(&f, "experts.down_proj")->layout;
                for (int rank = 0; rank < 5; rank++)
                    CHECK_INT_EQ(pairs->shards[rank].width,
                                 2 * row->shards[rank].width);
            }
            fixture_free(&f);
        }
}

static void
test_pairs_are_not_split_where_there_are_fewer_than_ranks(void)
{
    fixture f = fixture_new(4);
    add_module(&f, "", TP_MODULE_OTHER, 0);
    const int module = add_module(&f, "experts", TP_MODULE_OTHER, 0);
    add_shaped(&f, module, "gate_up_proj", 3, (int64_t[]){EXPERTS, HIDDEN, 6}, -1);
    add_rule(&f, "up", ".*gate_up_proj$", TP_PARTITION_ROW);
    CHECK_REFUSED(&f, "3 units of 2 cannot be spread over 4 ranks");
}

int
main(void)
{
    RUN(test_features_that_do_not_divide_are_sharded_in_units_of_16_bytes);
    RUN(test_wide_elements_are_sharded_as_those_of_16_bits_which_they_may_become);
    RUN(test_features_that_divide_stay_equal);
    RUN(test_a_grain_and_16_bytes_hold_together);
    RUN(test_no_rank_is_without_features_where_units_are_too_large);
    RUN(test_experts_are_in_units_also_where_they_divide);
    RUN(test_the_smallest_element_decides_for_the_whole_model);
    RUN(test_pairs_that_take_turns_fit_the_row_layer_at_any_grain);
    RUN(test_pairs_are_not_split_where_there_are_fewer_than_ranks);
    return check_result();
}
