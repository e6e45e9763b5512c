/* SPDX-License-Identifier: Apache-2.0 */
#include "copy_on_cpu.h"

/* Sizes around those of tiles and words, and every alignment of both sides. */
typedef struct {
    tp_shard_view view;
    int64_t full_off; /* bytes that the tensors lie off an aligned address */
    int64_t shard_off;
} example;

static const int64_t kMiddle[] = {3, 5};
static const int64_t kFused[] = {0, 64, 256, 64, 512, 64};
static const int64_t kMixed[] = {600, 100, 7, 33, 40, 1, 41, 2};
static const int64_t kAll[] = {0, 768};

static const example kExamples[] = {
    {{1, 16, 1, 2, kMiddle, 2}, 0, 0},    {{1, 16, 4096, 2, kMiddle, 2}, 0, 0},
    {{1, 16, 4099, 2, kMiddle, 2}, 0, 0}, {{1, 16, 40001, 1, kMiddle, 2}, 5, 5},
    {{37, 768, 1, 2, kFused, 6}, 0, 0},   {{37, 768, 3, 4, kFused, 6}, 0, 0},
    {{300, 768, 1, 2, kMixed, 8}, 2, 0},  {{5, 768, 129, 8, kMixed, 8}, 0, 8},
    {{2, 768, 33, 16, kFused, 6}, 16, 0}, {{3, 768, 11, 3, kMixed, 8}, 1, 2},
    {{9, 768, 7, 2, kAll, 2}, 0, 6},      {{1, 768, 100, 2, kMixed, 8}, 6, 4},
    {{2050, 16, 1, 1, kMiddle, 2}, 0, 3}, {{1, 16, 1, 16, kMiddle, 2}, 0, 0},
    {{64, 768, 16, 2, kFused, 6}, 8, 8},  {{4, 16, 65536, 1, kMiddle, 2}, 3, 7},
};

enum { EXAMPLES = sizeof(kExamples) / sizeof(*kExamples), PAD = 64 };

static int64_t
full_bytes(const tp_shard_view *view)
{
    return view->outer * view->size * view->inner * view->item;
}

/* Memory with `bytes` bytes `off` an aligned address, padding before and behind. */
static unsigned char *
make(int64_t bytes, int64_t off, unsigned char **owned)
{
    const size_t room = ((size_t)(bytes + off) + 3 * PAD) / PAD * PAD;
    *owned = aligned_alloc(PAD, room);
    for (size_t i = 0; i < room; i++)
        (*owned)[i] = (unsigned char)(i % 251);
    return *owned + PAD + off;
}

static void
try_pack(const example *it, int32_t room, unsigned seed)
{
    const int64_t bytes = tp_shard_bytes(&it->view);
    unsigned char *owned[3];
    unsigned char *full = make(full_bytes(&it->view), it->full_off, &owned[0]);
    unsigned char *got = make(bytes, it->shard_off, &owned[1]);
    unsigned char *want = make(bytes, it->shard_off, &owned[2]);
    tp_shard_pack(&it->view, full, want, 0, bytes);

    tp_error err = TP_NO_ERROR;
    tp_copies list = TP_NO_COPIES;
    CHECK_OK(tp_copies_pack(&list, &it->view, full, got, &err), &err);
    start_on_cpu(list.items, list.count, room, seed);
    CHECK(memcmp(got - PAD, want - PAD, (size_t)bytes + 2 * PAD) == 0);
    tp_copies_clear(&list);
    for (int i = 0; i < 3; i++)
        free(owned[i]);
}

static void
try_unpack(const example *it, int32_t room, unsigned seed)
{
    const int64_t bytes = tp_shard_bytes(&it->view);
    const int64_t full = full_bytes(&it->view);
    unsigned char *owned[3];
    unsigned char *shard = make(bytes, it->shard_off, &owned[0]);
    unsigned char *got = make(full, it->full_off, &owned[1]);
    unsigned char *want = make(full, it->full_off, &owned[2]);
    memset(got, 255, (size_t)full);
    memset(want, 255, (size_t)full);
    tp_shard_unpack(&it->view, want, shard, 0, bytes);

    tp_error err = TP_NO_ERROR;
    tp_copies list = TP_NO_COPIES;
    CHECK_OK(tp_copies_unpack(&list, &it->view, got, shard, &err), &err);
    start_on_cpu(list.items, list.count, room, seed);
    CHECK(memcmp(got - PAD, want - PAD, (size_t)full + 2 * PAD) == 0);
    tp_copies_clear(&list);
    for (int i = 0; i < 3; i++)
        free(owned[i]);
}

static void
test_tiles_in_any_order_pack_and_unpack_what_the_cpu_does(void)
{
    for (unsigned i = 0; i < EXAMPLES; i++)
        for (unsigned seed = 0; seed < 3; seed++) {
            try_pack(&kExamples[i], seed == 1 ? 1 : 500, 7 * seed);
            try_unpack(&kExamples[i], seed == 1 ? 2 : 500, 11 * seed);
        }
}

static void
test_many_tensors_share_launches(void)
{
    enum { COUNT = 1200, FULL = 96, SHARD = 64 };
    static unsigned char full[COUNT][FULL];
    static unsigned char got[COUNT][SHARD];
    const int64_t runs[] = {8, 16};
    const tp_shard_view view = {2, 24, 1, 2, runs, 2};
    tp_error err = TP_NO_ERROR;
    tp_copies list = TP_NO_COPIES;
    for (int i = 0; i < COUNT; i++) {
        for (int byte = 0; byte < FULL; byte++)
            full[i][byte] = (unsigned char)(i * 7 + byte);
        const tp_shard_view one = {1, 48, 1, 2, runs, 2};
        CHECK_OK(tp_copies_pack(&list, i % 2 ? &view : &one, full[i], got[i], &err),
                 &err);
    }
    CHECK_INT_EQ(list.count, COUNT);
    int32_t tiles = 0;
    CHECK_INT_EQ(tp_copy_count_tiles(list.items, list.count, 500, &tiles), 500);
    CHECK_INT_EQ(tiles, 500);
    start_on_cpu(list.items, list.count, 500, 3);
    for (int i = 0; i < COUNT; i++) {
        CHECK_INT_EQ(memcmp(got[i], full[i] + 16, 32), 0);
        if (i % 2 == 1)
            CHECK_INT_EQ(memcmp(got[i] + 32, full[i] + 48 + 16, 32), 0);
    }
    tp_copies_clear(&list);
}

/* The words of the copies of a pack at addresses that are never read. */
static void
words(const tp_shard_view *view, uintptr_t full, uintptr_t shard, tp_copies *list)
{
    tp_error err = TP_NO_ERROR;
    *list = (tp_copies)TP_NO_COPIES;
    CHECK_OK(tp_copies_pack(list, view, (const void *)full, (void *)shard, &err), &err);
}

static void
test_words_are_as_wide_as_the_addresses_allow(void)
{
    tp_copies list;
    const tp_shard_view column = {1, 16, 4096, 2, kMiddle, 2};
    words(&column, 1 << 20, 1 << 24, &list);
    CHECK_INT_EQ(list.count, 1);
    CHECK_INT_EQ(list.items[0].word, 16);
    tp_copies_clear(&list);

    /* 3 * 40001 bytes into the tensor: head, body and tail, as both sides are alike. */
    const tp_shard_view odd = {1, 16, 40001, 1, kMiddle, 2};
    words(&odd, (1 << 20) + 2, (1 << 24) + 5, &list);
    if (CHECK_INT_EQ(list.count, 3)) {
        CHECK_INT_EQ(list.items[0].row_bytes, 11);
        CHECK_INT_EQ(list.items[0].word, 1);
        CHECK_INT_EQ(list.items[1].word, 16);
        CHECK_INT_EQ(
            list.items[0].row_bytes + list.items[1].row_bytes + list.items[2].row_bytes,
            5 * 40001);
    }
    tp_copies_clear(&list);

    /* A shift of two bytes between the sides leaves words of two. */
    const tp_shard_view shifted = {1, 16, 65536, 2, kMiddle, 2};
    words(&shifted, 1 << 20, (1 << 24) + 2, &list);
    CHECK_INT_EQ(list.count, 1);
    CHECK_INT_EQ(list.items[0].word, 2);
    tp_copies_clear(&list);
}

static void
test_runs_that_touch_are_one_copy_and_a_full_tensor_is_one_row(void)
{
    tp_copies list;
    const int64_t touching[] = {0, 256, 256, 512};
    const tp_shard_view view = {100, 768, 8, 2, touching, 4};
    words(&view, 1 << 20, 1 << 26, &list);
    CHECK_INT_EQ(list.count, 1);
    CHECK_INT_EQ(list.items[0].rows, 1);
    CHECK_INT_EQ(list.items[0].row_bytes, 100 * 768 * 16);
    tp_copies_clear(&list);
}

static void
test_offsets_and_tiles_beyond_32_bits_are_exact(void)
{
    const int64_t runs[] = {((int64_t)1 << 33) + 8, (int64_t)1 << 34};
    const tp_shard_view view = {3, (int64_t)1 << 36, 1, 2, runs, 2};
    tp_copies list;
    words(&view, (uintptr_t)1 << 40, (uintptr_t)1 << 50, &list);
    CHECK_INT_EQ(list.count, 1);
    const tp_copy *copy = &list.items[0];
    const int64_t tiles = tp_copy_tiles(copy);
    CHECK_INT_EQ(tiles, 3 * ((int64_t)1 << 35) / 16384);
    const tp_tile last = tp_copy_tile(copy, tiles - 1);
    CHECK_INT_EQ(last.from, 2 * ((int64_t)1 << 37) + ((int64_t)1 << 35) - 16384);
    CHECK_INT_EQ(last.to, 3 * ((int64_t)1 << 35) - 16384);
    CHECK_INT_EQ(last.words, 1024);

    /* More tiles than a launch takes: none fits, and nothing is numbered. */
    const int64_t one[] = {1, ((int64_t)1 << 44) + 1};
    const tp_shard_view huge = {1, (int64_t)1 << 45, 1, 1, one, 2};
    tp_copies_clear(&list);
    words(&huge, (uintptr_t)1 << 50, (uintptr_t)1 << 52, &list);
    int32_t few = 1;
    CHECK_INT_EQ(tp_copy_count_tiles(list.items, list.count, 500, &few), 0);
    CHECK_INT_EQ(few, 0);
    tp_copies_clear(&list);
}

static void
test_a_view_without_elements_has_no_copies(void)
{
    tp_copies list;
    const tp_shard_view none[] = {
        {0, 16, 4, 2, kMiddle, 2}, {2, 16, 0, 2, kMiddle, 2}, {2, 16, 4, 2, NULL, 0}};
    for (int i = 0; i < 3; i++) {
        words(&none[i], 1 << 20, 1 << 24, &list);
        CHECK_INT_EQ(list.count, 0);
        tp_copies_clear(&list);
    }
}

int
main(void)
{
    RUN(test_tiles_in_any_order_pack_and_unpack_what_the_cpu_does);
    RUN(test_many_tensors_share_launches);
    RUN(test_words_are_as_wide_as_the_addresses_allow);
    RUN(test_runs_that_touch_are_one_copy_and_a_full_tensor_is_one_row);
    RUN(test_offsets_and_tiles_beyond_32_bits_are_exact);
    RUN(test_a_view_without_elements_has_no_copies);
    return check_result();
}
