/* SPDX-License-Identifier: Apache-2.0 */
#include "layout/reshard.h"

#include <stdlib.h>

#include "check.h"
#include "layout/layout.h"

#define SIZE 24
#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define LIST(array)           \
    {                         \
        (array), COUNT(array) \
    }

/* Every element of the new shard has the number that it has in the full dimension. */
static void
check_values(const tp_run_list *sources, int ranks, tp_run_list target)
{
    tp_error err = TP_NO_ERROR;
    tp_reshard_copy *copies = NULL;
    int count = 0;
    int64_t shard[4 * SIZE], expected[4 * SIZE], width = 0, made = 0;
    if (!CHECK_OK(tp_reshard(sources, ranks, target, &copies, &count, &err), &err))
        return;
    for (int i = 0; i < target.count; i += 2)
        for (int64_t j = 0; j < target.values[i + 1]; j++)
            expected[width++] = target.values[i] + j;
    for (int i = 0; i < count; i++) {
        int64_t old[4 * SIZE], held = 0;
        const tp_run_list *source = &sources[copies[i].rank];
        for (int k = 0; k < source->count; k += 2)
            for (int64_t j = 0; j < source->values[k + 1]; j++)
                old[held++] = source->values[k] + j;
        CHECK(copies[i].from + copies[i].length <= held);
        CHECK_INT_EQ(copies[i].to, made);
        for (int64_t j = 0; j < copies[i].length; j++)
            shard[made++] = old[copies[i].from + j];
    }
    CHECK_INT_EQ(made, width);
    for (int64_t j = 0; j < made && j < width; j++)
        CHECK_INT_EQ(shard[j], expected[j]);
    free(copies);
}

/* Runs of every rank when q, k, v pieces with `keys` key/value heads are laid over
 * `ranks`; `values` has room for 8 a rank. */
static void
fused_runs(int64_t keys, int ranks, int64_t *values, tp_run_list *lists)
{
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = NULL;
    const tp_layout *layout = NULL;
    const tp_heads heads = {.query = 8, .key = keys};
    const tp_piece pieces[] = {{16, 2, TP_PIECE_QUERY},
                               {keys * 2, 2, TP_PIECE_KEY},
                               {keys * 2, 2, TP_PIECE_KEY}};
    if (!CHECK_OK(tp_arena_new(&arena, &err), &err) ||
        !CHECK_OK(tp_layout_new(arena, pieces, 3, heads, ranks, &layout, &err), &err))
        return;
    for (int rank = 0; rank < ranks; rank++) {
        int64_t *at = values + (ptrdiff_t)rank * 8;
        const tp_shard *shard = &layout->shards[rank];
        for (int i = 0; i < shard->count; i++) {
            at[2 * i] = shard->runs[i].start;
            at[2 * i + 1] = shard->runs[i].length;
        }
        lists[rank] = (tp_run_list){at, 2 * shard->count};
    }
    tp_arena_free(arena);
}

static void
test_any_layout_is_made_of_the_shards_of_any_other(void)
{
    for (int64_t keys = 1; keys <= 8; keys *= 2)
        for (int old = 1; old <= 6; old++)
            for (int new = 1; new <= 6; new ++) {
                int64_t old_values[48], new_values[48];
                tp_run_list sources[6], targets[6];
                fused_runs(keys, old, old_values, sources);
                fused_runs(keys, new, new_values, targets);
                for (int rank = 0; rank < new; rank++)
                    check_values(sources, old, targets[rank]);
            }
}

static void
test_what_several_ranks_hold_is_read_from_the_lowest(void)
{
    tp_error err = TP_NO_ERROR;
    const int64_t first[] = {0, 4, 8, 4}, second[] = {4, 4, 8, 4}, full[] = {0, 12};
    const tp_run_list sources[] = {LIST(second), LIST(first)};
    const tp_run_list target = LIST(full);
    tp_reshard_copy *copies = NULL;
    int count = 0;
    if (!CHECK_OK(tp_reshard(sources, 2, target, &copies, &count, &err), &err))
        return;
    CHECK_INT_EQ(count, 2);
    CHECK_INT_EQ(copies[0].rank, 1);
    CHECK_INT_EQ(copies[1].rank, 0);
    CHECK_INT_EQ(copies[1].length, 8);
    free(copies);
}

static void
test_what_no_rank_holds_and_what_are_no_runs_is_refused(void)
{
    tp_error err = TP_NO_ERROR;
    tp_reshard_copy *copies = NULL;
    int count = 0;
    const int64_t part[] = {0, 4}, more[] = {2, 4}, odd[] = {0, 4, 4}, none[] = {0, 0},
                  before[] = {-1, 4}, far[] = {INT64_MAX, 2};
    const tp_run_list sources[] = {LIST(part)};
    const tp_run_list wrong[] = {LIST(odd), LIST(none), LIST(before), LIST(far)};
    const tp_run_list target = LIST(more);
    CHECK_FAILS(tp_reshard(sources, 1, target, &copies, &count, &err), TP_VALUE, &err,
                "no old rank holds element 4");
    for (int i = 0; i < COUNT(wrong); i++) {
        CHECK_FAILS(tp_reshard(&wrong[i], 1, target, &copies, &count, &err), TP_VALUE,
                    &err, "old rank 0: ");
        CHECK_FAILS(tp_reshard(sources, 1, wrong[i], &copies, &count, &err), TP_VALUE,
                    &err, "new shard 0: ");
    }
}

/* Its offset in the shard and its place in the dimension add up to more than 63 bits.
 */
static void
test_a_run_near_the_largest_number_is_read(void)
{
    tp_error err = TP_NO_ERROR;
    tp_reshard_copy *copies = NULL;
    int count = 0;
    const int64_t half = INT64_MAX / 2, values[] = {0, half, half, half},
                  wanted[] = {INT64_MAX - 9, 8};
    const tp_run_list source = LIST(values), target = LIST(wanted);
    if (!CHECK_OK(tp_reshard(&source, 1, target, &copies, &count, &err), &err))
        return;
    CHECK_INT_EQ(count, 1);
    CHECK_INT_EQ(copies[0].from, INT64_MAX - 9);
    CHECK_INT_EQ(copies[0].length, 8);
    free(copies);
}

int
main(void)
{
    RUN(test_any_layout_is_made_of_the_shards_of_any_other);
    RUN(test_what_several_ranks_hold_is_read_from_the_lowest);
    RUN(test_a_run_near_the_largest_number_is_read);
    RUN(test_what_no_rank_holds_and_what_are_no_runs_is_refused);
    return check_result();
}
