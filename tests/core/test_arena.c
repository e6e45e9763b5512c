/* SPDX-License-Identifier: Apache-2.0 */
#include "base/arena.h"

#include <stdint.h>

#include "check.h"

static void
test_pieces_are_zeroed_aligned_and_do_not_overlap(void)
{
    enum { PIECES = 2000 };
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = NULL;
    unsigned char *piece[PIECES];
    if (!CHECK_OK(tp_arena_new(&arena, &err), &err))
        return;

    for (size_t i = 0; i < PIECES; i++) {
        const size_t size = i % 97;
        piece[i] = tp_arena_take(arena, size, 1, &err);
        if (!CHECK(piece[i] != NULL) ||
            !CHECK_INT_EQ((uintptr_t)piece[i] % _Alignof(max_align_t), 0))
            goto done;
        for (size_t at = 0; at < size; at++)
            if (!CHECK_INT_EQ(piece[i][at], 0))
                goto done;
        memset(piece[i], (int)(i % 251) + 1, size);
    }
    for (size_t i = 0; i < PIECES; i++)
        for (size_t at = 0; at < i % 97; at++)
            if (!CHECK_INT_EQ(piece[i][at], i % 251 + 1))
                goto done;
done:
    tp_arena_free(arena);
}

static void
test_a_piece_larger_than_any_block_is_whole(void)
{
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = NULL;
    CHECK_OK(tp_arena_new(&arena, &err), &err);
    const size_t size = (size_t)3 << 20;
    char *large = tp_arena_take(arena, size / 8, 8, &err);
    char *small = tp_arena_take(arena, 1, 1, &err);
    if (CHECK(large != NULL && small != NULL)) {
        memset(large, 1, size);
        CHECK_INT_EQ(*small, 0);
        *small = 2;
        CHECK_INT_EQ(large[size - 1], 1);
    }
    tp_arena_free(arena);
}

static void
test_a_product_that_overflows_is_out_of_memory(void)
{
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = NULL;
    CHECK_OK(tp_arena_new(&arena, &err), &err);
    const struct {
        size_t count;
        size_t size;
    } too_large[] = {{SIZE_MAX / 2, 3}, {SIZE_MAX, 1}, {SIZE_MAX - 64, 1}};
    for (size_t i = 0; i < sizeof(too_large) / sizeof(too_large[0]); i++) {
        CHECK(tp_arena_take(arena, too_large[i].count, too_large[i].size, &err) ==
              NULL);
        CHECK_INT_EQ(err.code, TP_MEMORY);
        tp_error_clear(&err);
    }
    CHECK(tp_arena_text(arena, "", SIZE_MAX, &err) == NULL);
    CHECK_INT_EQ(err.code, TP_MEMORY);
    tp_error_clear(&err);
    CHECK(tp_arena_take(arena, 1, 1, &err) != NULL);
    tp_arena_free(arena);
}

static void
test_a_text_is_a_terminated_copy_of_the_given_size(void)
{
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = NULL;
    CHECK_OK(tp_arena_new(&arena, &err), &err);
    char source[] = "model.layers";
    const char *part = tp_arena_text(arena, source, 5, &err);
    const char *none = tp_arena_text(arena, NULL, 0, &err);
    source[0] = 'X';
    CHECK_TEXT_EQ(part, "model");
    CHECK_TEXT_EQ(none, "");
    tp_arena_free(arena);
}

static void
test_freeing_nothing_is_fine(void)
{
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = NULL;
    tp_arena_free(NULL);
    CHECK_OK(tp_arena_new(&arena, &err), &err);
    tp_arena_free(arena);
}

int
main(void)
{
    RUN(test_pieces_are_zeroed_aligned_and_do_not_overlap);
    RUN(test_a_piece_larger_than_any_block_is_whole);
    RUN(test_a_product_that_overflows_is_out_of_memory);
    RUN(test_a_text_is_a_terminated_copy_of_the_given_size);
    RUN(test_freeing_nothing_is_fine);
    return check_result();
}
