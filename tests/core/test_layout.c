/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdlib.h>

#include "check.h"
#include "layout/layout.h"

/* A generator of its own, so that a failure comes again. */
static uint32_t state = 12345;

static int
pick(int low, int high)
{
    state = state * 1664525u + 1013904223u;
    return low + (int)((state >> 8) % (uint32_t)(high - low + 1));
}

static tp_arena *
new_arena(void)
{
    tp_arena *arena = NULL;
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_arena_new(&arena, &err), &err);
    return arena;
}

/* Head counts that fit the ranks, and up to four pieces of any role. */
static int
random_pieces(tp_piece *pieces, tp_heads *heads, int ranks)
{
    const int key = pick(1, 6);
    const int least = (ranks + key - 1) / key;
    heads->key = key;
    heads->query = key * pick(least, least + 3);
    const int count = pick(1, 4);
    for (int i = 0; i < count; i++) {
        tp_piece *piece = &pieces[i];
        piece->role = (tp_piece_role)pick(TP_PIECE_PLAIN, TP_PIECE_KEY);
        piece->unit = pick(1, 5);
        if (piece->role == TP_PIECE_QUERY)
            piece->size = heads->query * piece->unit;
        else if (piece->role == TP_PIECE_KEY)
            piece->size = heads->key * piece->unit;
        else if (piece->role == TP_PIECE_UNITS)
            piece->size = piece->unit * pick(ranks, ranks + 9);
        else
            piece->size = pick(ranks, ranks + 40);
    }
    return count;
}

/* Every element is held by as many ranks as its run says, the lowest being the
 * owner; widths are what the runs add up to. */
static void
check_cover(const tp_layout *layout)
{
    int *holders = calloc((size_t)layout->size, sizeof(*holders));
    int *lowest = calloc((size_t)layout->size, sizeof(*lowest));
    for (int rank = 0; rank < layout->ranks; rank++) {
        const tp_shard *shard = &layout->shards[rank];
        int64_t width = 0;
        int64_t end = -1;
        CHECK(shard->count > 0);
        for (int i = 0; i < shard->count; i++) {
            const tp_run *run = &shard->runs[i];
            CHECK(run->length > 0 && run->start >= end);
            CHECK(run->start + run->length <= layout->size);
            CHECK(rank >= run->owner && rank < run->owner + run->holders);
            end = run->start + run->length;
            width += run->length;
            for (int64_t at = run->start; at < end; at++) {
                if (holders[at]++ == 0)
                    lowest[at] = rank;
            }
        }
        CHECK_INT_EQ(shard->width, width);
    }
    bool held = true;
    for (int rank = 0; rank < layout->ranks; rank++) {
        const tp_shard *shard = &layout->shards[rank];
        for (int i = 0; i < shard->count; i++) {
            const tp_run *run = &shard->runs[i];
            for (int64_t at = run->start; at < run->start + run->length; at++)
                held &= holders[at] == run->holders && lowest[at] == run->owner;
        }
    }
    for (int64_t at = 0; at < layout->size; at++)
        held &= holders[at] > 0;
    CHECK(held);
    free(holders);
    free(lowest);
}

static void
test_random_layouts_hold_every_element_as_often_as_they_say(void)
{
    tp_arena *arena = new_arena();
    tp_error err = TP_NO_ERROR;
    for (int round = 0; round < 2000; round++) {
        tp_piece pieces[4];
        tp_heads heads;
        const tp_layout *layout = NULL;
        const int ranks = pick(1, 9);
        const int count = random_pieces(pieces, &heads, ranks);
        if (!CHECK_OK(tp_layout_new(arena, pieces, count, heads, ranks, &layout, &err),
                      &err))
            break;
        int64_t size = 0;
        for (int i = 0; i < count; i++)
            size += pieces[i].size;
        CHECK_INT_EQ(layout->size, size);
        CHECK_INT_EQ(layout->ranks, ranks);
        check_cover(layout);
    }
    tp_arena_free(arena);
}

static void
test_plain_pieces_follow_one_another_from_rank_to_rank(void)
{
    tp_arena *arena = new_arena();
    tp_error err = TP_NO_ERROR;
    for (int round = 0; round < 300; round++) {
        const int ranks = pick(1, 9);
        const tp_piece piece = {pick(ranks, 200), pick(1, 40), TP_PIECE_PLAIN};
        const tp_layout *layout = NULL;
        CHECK_OK(
            tp_layout_new(arena, &piece, 1, (tp_heads){0, 0}, ranks, &layout, &err),
            &err);
        int64_t end = 0;
        for (int rank = 0; rank < ranks; rank++) {
            CHECK_INT_EQ(layout->shards[rank].count, 1);
            CHECK_INT_EQ(layout->shards[rank].runs[0].start, end);
            end += layout->shards[rank].width;
        }
        CHECK_INT_EQ(end, piece.size);
    }
    tp_arena_free(arena);
}

static void
test_units_are_never_split(void)
{
    tp_arena *arena = new_arena();
    tp_error err = TP_NO_ERROR;
    for (int round = 0; round < 300; round++) {
        const int ranks = pick(1, 9);
        const int unit = pick(1, 12);
        const tp_piece piece = {unit * pick(ranks, 30), unit, TP_PIECE_UNITS};
        const tp_layout *layout = NULL;
        CHECK_OK(
            tp_layout_new(arena, &piece, 1, (tp_heads){0, 0}, ranks, &layout, &err),
            &err);
        for (int rank = 0; rank < ranks; rank++) {
            CHECK_INT_EQ(layout->shards[rank].runs[0].start % unit, 0);
            CHECK_INT_EQ(layout->shards[rank].width % unit, 0);
        }
    }
    tp_arena_free(arena);
}

/* What attention does on a rank: its query head i attends to its key head
 * i / (query / key). That has to be the head it attends to in the whole model. */
static void
test_local_query_heads_attend_to_the_key_heads_they_had(void)
{
    tp_arena *arena = new_arena();
    tp_error err = TP_NO_ERROR;
    for (int round = 0; round < 1000; round++) {
        const int ranks = pick(1, 12);
        const int key = pick(1, 8);
        const int group = pick((ranks + key - 1) / key, 12);
        const tp_heads heads = {(int64_t)key * group, key};
        const tp_piece pieces[] = {{heads.query, 1, TP_PIECE_QUERY},
                                   {heads.key, 1, TP_PIECE_KEY}};
        const tp_layout *query = NULL;
        const tp_layout *held = NULL;
        CHECK_OK(tp_layout_new(arena, &pieces[0], 1, heads, ranks, &query, &err), &err);
        CHECK_OK(tp_layout_new(arena, &pieces[1], 1, heads, ranks, &held, &err), &err);
        int64_t next = 0;
        for (int rank = 0; rank < ranks; rank++) {
            tp_heads own = {0, 0};
            CHECK_OK(tp_heads_of_rank(heads, ranks, rank, &own, &err), &err);
            CHECK_INT_EQ(own.query, query->shards[rank].width);
            CHECK_INT_EQ(own.key, held->shards[rank].width);
            CHECK_INT_EQ(own.query % own.key, 0);
            const int64_t start = query->shards[rank].runs[0].start;
            const int64_t first_key = held->shards[rank].runs[0].start;
            CHECK_INT_EQ(start, next);
            for (int64_t i = 0; i < own.query; i++) {
                const int64_t local = i / (own.query / own.key);
                CHECK_INT_EQ(first_key + local, (start + i) / group);
            }
            next = start + own.query;
        }
        CHECK_INT_EQ(next, heads.query);
    }
    tp_arena_free(arena);
}

static void
test_three_key_heads_over_two_ranks_keep_full_groups(void)
{
    tp_error err = TP_NO_ERROR;
    tp_heads own = {0, 0};
    CHECK_OK(tp_heads_of_rank((tp_heads){12, 3}, 2, 0, &own, &err), &err);
    CHECK_INT_EQ(own.query, 8);
    CHECK_INT_EQ(own.key, 2);
    CHECK_OK(tp_heads_of_rank((tp_heads){12, 3}, 2, 1, &own, &err), &err);
    CHECK_INT_EQ(own.query, 4);
    CHECK_INT_EQ(own.key, 1);
}

static void
test_key_heads_fewer_than_ranks_are_held_by_several(void)
{
    tp_arena *arena = new_arena();
    tp_error err = TP_NO_ERROR;
    const tp_piece piece = {2 * 16, 16, TP_PIECE_KEY};
    const tp_layout *layout = NULL;
    CHECK_OK(tp_layout_new(arena, &piece, 1, (tp_heads){8, 2}, 4, &layout, &err), &err);
    for (int rank = 0; rank < 4; rank++) {
        const tp_run *run = &layout->shards[rank].runs[0];
        CHECK_INT_EQ(run->start, rank / 2 * 16);
        CHECK_INT_EQ(run->length, 16);
        CHECK_INT_EQ(run->owner, rank / 2 * 2);
        CHECK_INT_EQ(run->holders, 2);
    }
    tp_arena_free(arena);
}

static void
test_neighbouring_runs_of_one_rank_are_joined(void)
{
    tp_arena *arena = new_arena();
    tp_error err = TP_NO_ERROR;
    const tp_piece pieces[] = {{8, 1, TP_PIECE_PLAIN}, {6, 1, TP_PIECE_PLAIN}};
    const tp_layout *layout = NULL;
    CHECK_OK(tp_layout_new(arena, pieces, 2, (tp_heads){0, 0}, 1, &layout, &err), &err);
    CHECK_INT_EQ(layout->shards[0].count, 1);
    CHECK_INT_EQ(layout->shards[0].width, 14);
    CHECK_OK(tp_layout_new(arena, pieces, 2, (tp_heads){0, 0}, 2, &layout, &err), &err);
    CHECK_INT_EQ(layout->shards[0].count, 2);
    CHECK_INT_EQ(layout->shards[1].runs[1].start, 11);
    tp_arena_free(arena);
}

static void
test_what_leaves_a_rank_without_anything_is_refused(void)
{
    tp_arena *arena = new_arena();
    tp_error err = TP_NO_ERROR;
    const tp_layout *layout = NULL;
    const tp_heads none = {0, 0};
    const tp_piece plain = {3, 1, TP_PIECE_PLAIN};
    const tp_piece units = {12, 4, TP_PIECE_UNITS};
    const tp_piece heads = {3 * 8, 8, TP_PIECE_QUERY};
    CHECK_FAILS(tp_layout_new(arena, &plain, 1, none, 4, &layout, &err), TP_VALUE, &err,
                "size 3");
    CHECK_FAILS(tp_layout_new(arena, &units, 1, none, 4, &layout, &err), TP_VALUE, &err,
                "3 units of 4");
    CHECK_FAILS(tp_layout_new(arena, &heads, 1, (tp_heads){3, 3}, 4, &layout, &err),
                TP_VALUE, &err, "3 query heads cannot be spread over 4 ranks");
    tp_arena_free(arena);
}

static void
test_pieces_that_contradict_the_heads_are_refused(void)
{
    tp_arena *arena = new_arena();
    tp_error err = TP_NO_ERROR;
    const tp_layout *layout = NULL;
    const tp_piece wrong = {40, 8, TP_PIECE_QUERY};
    const tp_piece right = {56, 8, TP_PIECE_QUERY};
    CHECK_FAILS(tp_layout_new(arena, &wrong, 1, (tp_heads){4, 2}, 2, &layout, &err),
                TP_VALUE, &err, "size 40 is not 4 query heads of 8");
    CHECK_FAILS(tp_layout_new(arena, &right, 1, (tp_heads){7, 2}, 2, &layout, &err),
                TP_VALUE, &err, "equal groups");
    CHECK_FAILS(tp_layout_new(arena, &right, 0, (tp_heads){7, 7}, 2, &layout, &err),
                TP_VALUE, &err, "0 pieces");
    const tp_piece huge[] = {{INT64_MAX, 1, TP_PIECE_PLAIN}, {8, 1, TP_PIECE_PLAIN}};
    CHECK_FAILS(tp_layout_new(arena, huge, 2, (tp_heads){0, 0}, 2, &layout, &err),
                TP_VALUE, &err, "the sizes of 2 pieces sum to 2^63 or more");
    CHECK_FAILS(tp_layout_new(arena, &right, 1, (tp_heads){0, 0}, 2, &layout, &err),
                TP_VALUE, &err, "size 56 is not 0 query heads of 8");
    const tp_piece keys = {56, 8, TP_PIECE_KEY};
    CHECK_FAILS(tp_layout_new(arena, &keys, 1, (tp_heads){4, 2}, 2, &layout, &err),
                TP_VALUE, &err, "size 56 is not 2 key/value heads of 8");
    CHECK_FAILS(tp_layout_new(arena, &right, 1, (tp_heads){7, 7}, 0, &layout, &err),
                TP_VALUE, &err, "1 pieces over 0 ranks");
    tp_heads own;
    CHECK_FAILS(tp_heads_of_rank((tp_heads){4, 2}, 2, 2, &own, &err), TP_VALUE, &err,
                "rank 2");
    CHECK_FAILS(tp_heads_of_rank((tp_heads){4, 2}, 2, -1, &own, &err), TP_VALUE, &err,
                "rank -1");
    tp_arena_free(arena);
}

int
main(void)
{
    RUN(test_random_layouts_hold_every_element_as_often_as_they_say);
    RUN(test_plain_pieces_follow_one_another_from_rank_to_rank);
    RUN(test_units_are_never_split);
    RUN(test_local_query_heads_attend_to_the_key_heads_they_had);
    RUN(test_three_key_heads_over_two_ranks_keep_full_groups);
    RUN(test_key_heads_fewer_than_ranks_are_held_by_several);
    RUN(test_neighbouring_runs_of_one_rank_are_joined);
    RUN(test_what_leaves_a_rank_without_anything_is_refused);
    RUN(test_pieces_that_contradict_the_heads_are_refused);
    return check_result();
}
