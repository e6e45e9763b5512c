/* SPDX-License-Identifier: Apache-2.0 */
#include "layout/layout_cache.h"

#include "check.h"

enum { LAYOUTS = 500, PIECES = 20 };

static tp_arena *
new_arena(void)
{
    tp_arena *arena = NULL;
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_arena_new(&arena, &err), &err);
    return arena;
}

static const tp_layout *
get(tp_layout_cache *layouts, const tp_piece *pieces, int count, tp_heads heads)
{
    tp_error err = TP_NO_ERROR;
    const tp_layout *layout = NULL;
    CHECK_OK(tp_layout_cache_get(layouts, pieces, count, heads, &layout, &err), &err);
    return layout;
}

static void
test_equal_pieces_have_one_layout_and_each_difference_another(void)
{
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = new_arena();
    tp_layout_cache *layouts = NULL;
    CHECK_OK(tp_layout_cache_new(arena, 2, &layouts, &err), &err);
    const tp_heads heads = {4, 2}, none = {0, 0};
    const tp_piece pieces[] = {{16, 4, TP_PIECE_QUERY}, {8, 4, TP_PIECE_KEY}};
    const tp_piece again[] = {{16, 4, TP_PIECE_QUERY}, {8, 4, TP_PIECE_KEY}};
    const tp_layout *first = get(layouts, pieces, 2, heads);
    CHECK(get(layouts, again, 2, heads) == first);
    CHECK_INT_EQ(tp_layout_cache_count(layouts), 1);
    CHECK_INT_EQ(first->size, 24);

    const tp_piece size = {24, 4, TP_PIECE_UNITS}, unit = {24, 2, TP_PIECE_UNITS},
                   role = {24, 4, TP_PIECE_PLAIN};
    const tp_layout *others[] = {
        get(layouts, pieces, 1, heads),
        get(layouts, pieces, 2, (tp_heads){4, 2}),
        get(layouts, pieces, 1, (tp_heads){4, 4}),
        get(layouts, &size, 1, none),
        get(layouts, &unit, 1, none),
        get(layouts, &role, 1, none),
    };
    CHECK(others[1] == first);
    CHECK_INT_EQ(tp_layout_cache_count(layouts), 6);
    CHECK_INT_EQ(others[0]->size, 16);
    CHECK_INT_EQ(others[3]->size, 24);
    tp_layout_cache_free(layouts);
    tp_layout_cache_free(NULL);
    tp_arena_free(arena);
}

/* As many as there are slots at first, several times: each is found again. */
static void
test_hundreds_of_layouts_are_all_found_again(void)
{
    static const tp_layout *found[LAYOUTS];
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = new_arena();
    tp_layout_cache *layouts = NULL;
    tp_piece pieces[PIECES];
    CHECK_OK(tp_layout_cache_new(arena, 3, &layouts, &err), &err);
    for (int again = 0; again < 2; again++) {
        for (int i = 0; i < LAYOUTS; i++) {
            for (int j = 0; j < PIECES; j++)
                pieces[j] = (tp_piece){3 + i + j, 1, TP_PIECE_PLAIN};
            const tp_layout *layout =
                get(layouts, pieces, 1 + i % PIECES, (tp_heads){0, 0});
            if (again == 0)
                found[i] = layout;
            CHECK(layout == found[i]);
            CHECK_INT_EQ(layout->ranks, 3);
        }
        CHECK_INT_EQ(tp_layout_cache_count(layouts), LAYOUTS);
    }
    /* 3 + i of 3 + i, 4 + i, ...: the first piece of the layout of `i`. */
    CHECK_INT_EQ(found[0]->size, 3);
    CHECK_INT_EQ(found[21]->size, 24 + 25);
    tp_layout_cache_free(layouts);
    tp_arena_free(arena);
}

static void
test_pieces_that_have_no_layout_add_none(void)
{
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = new_arena();
    tp_layout_cache *layouts = NULL;
    const tp_layout *layout = NULL;
    const tp_piece thin = {1, 1, TP_PIECE_PLAIN};
    CHECK_OK(tp_layout_cache_new(arena, 2, &layouts, &err), &err);
    CHECK_FAILS(tp_layout_cache_get(layouts, &thin, 1, (tp_heads){0, 0}, &layout, &err),
                TP_VALUE, &err, "2 ranks");
    CHECK_INT_EQ(tp_layout_cache_count(layouts), 0);
    tp_layout_cache_free(layouts);
    tp_arena_free(arena);
}

int
main(void)
{
    RUN(test_equal_pieces_have_one_layout_and_each_difference_another);
    RUN(test_hundreds_of_layouts_are_all_found_again);
    RUN(test_pieces_that_have_no_layout_add_none);
    return check_result();
}
