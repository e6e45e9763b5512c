/* SPDX-License-Identifier: Apache-2.0 */
/* Sharding a weight, gathering it, and making other shards of its shards. */
#include "input.h"
#include "layout/layout_cache.h"
#include "layout/reshard.h"
#include "pack/compact.h"

enum { MOST_PIECES = 6, MOST_RANKS = 9, MOST_SIZE = 256, MOST_BYTES = 1 << 15 };

/* Runs as the packing takes them: start, length, start, length, ... */
typedef struct {
    int64_t values[2 * MOST_PIECES];
    int count;
} runs;

static runs
runs_of(const tp_layout *layout, int rank)
{
    const tp_shard *shard = &layout->shards[rank];
    runs out = {.count = 2 * shard->count};
    REQUIRE(shard->count <= MOST_PIECES);
    for (int i = 0; i < shard->count; i++) {
        out.values[2 * i] = shard->runs[i].start;
        out.values[2 * i + 1] = shard->runs[i].length;
    }
    return out;
}

/* The runs of a rank are in the dimension and add up to its width; it is one of those
 * that hold each. */
static void
check_shard(const tp_layout *layout, int rank)
{
    const tp_shard *shard = &layout->shards[rank];
    int64_t width = 0;
    REQUIRE(shard->count > 0);
    for (int i = 0; i < shard->count; i++) {
        const tp_run *run = &shard->runs[i];
        REQUIRE(run->start >= 0 && run->length > 0);
        REQUIRE(run->length <= layout->size &&
                run->start <= layout->size - run->length);
        REQUIRE(run->owner <= rank && rank < run->owner + run->holders);
        REQUIRE(run->owner + run->holders <= layout->ranks);
        width += run->length;
    }
    REQUIRE(width == shard->width);
}

/* Every element has one owner, and is on as many ranks as its run says. */
static void
check_owners(const tp_layout *layout)
{
    int owners[MOST_SIZE] = {0}, holders[MOST_SIZE] = {0};
    for (int rank = 0; rank < layout->ranks; rank++) {
        const tp_shard *shard = &layout->shards[rank];
        for (int i = 0; i < shard->count; i++)
            for (int64_t k = 0; k < shard->runs[i].length; k++) {
                owners[shard->runs[i].start + k] += shard->runs[i].owner == rank;
                holders[shard->runs[i].start + k]++;
            }
    }
    for (int rank = 0; rank < layout->ranks; rank++) {
        const tp_shard *shard = &layout->shards[rank];
        for (int i = 0; i < shard->count; i++)
            for (int64_t k = 0; k < shard->runs[i].length; k++)
                REQUIRE(holders[shard->runs[i].start + k] == shard->runs[i].holders);
    }
    for (int64_t i = 0; i < layout->size; i++)
        REQUIRE(owners[i] == 1);
}

static void
fill(unsigned char *bytes, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        bytes[i] = (unsigned char)(i * 7 + i / 253);
}

/* One shard is packed in two steps and in place, to the same bytes. */
static void
cut(const tp_shard_view *view, const unsigned char *full, int64_t bytes, int64_t middle,
    unsigned char *shard)
{
    const int64_t own = tp_shard_bytes(view);
    tp_error err = TP_NO_ERROR;
    REQUIRE(own <= bytes);
    middle = own > 0 ? middle % (own + 1) : 0;
    tp_shard_pack(view, full, shard, 0, middle);
    tp_shard_pack(view, full, shard, middle, own);
    unsigned char *part = malloc((size_t)(own - middle) + 1);
    REQUIRE(part != NULL);
    tp_shard_part(view, full, part, middle, own);
    REQUIRE(memcmp(part, shard + middle, (size_t)(own - middle)) == 0);
    free(part);
    if (tp_compact_check(view, &err) < 0) {
        tp_error_clear(&err);
        return;
    }
    unsigned char *memory = malloc((size_t)bytes);
    REQUIRE(memory != NULL);
    memcpy(memory, full, (size_t)bytes);
    tp_compact_on_cpu(view, memory);
    REQUIRE(memcmp(memory, shard, (size_t)own) == 0);
    free(memory);
}

/* The copies of a list, which are in any order. */
static void
run_copies(const tp_copies *list)
{
    for (int64_t i = 0; i < list->count; i++) {
        const tp_copy *copy = &list->items[i];
        for (int64_t row = 0; row < copy->rows; row++)
            memcpy((char *)copy->to + row * copy->to_pitch,
                   (const char *)copy->from + row * copy->from_pitch,
                   (size_t)copy->row_bytes);
    }
}

static void
check_copies(const tp_shard_view *view, const unsigned char *full,
             const unsigned char *shard, unsigned char *back)
{
    const size_t own = (size_t)tp_shard_bytes(view);
    tp_error err = TP_NO_ERROR;
    tp_copies list = TP_NO_COPIES;
    unsigned char *copied = malloc(own + 1);
    REQUIRE(copied != NULL && tp_copies_pack(&list, view, full, copied, &err) == 0);
    run_copies(&list);
    REQUIRE(memcmp(copied, shard, own) == 0);
    tp_copies_clear(&list);
    REQUIRE(tp_copies_unpack(&list, view, back, shard, &err) == 0);
    run_copies(&list);
    tp_copies_clear(&list);
    free(copied);
}

/* The shards of all ranks put together are the weight, however they are written. */
static void
check_gather(input *in, const tp_layout *layout)
{
    const int64_t outer = take_int(in, 1, 3), inner = take_int(in, 1, 5);
    const int64_t item = take_int(in, 1, 8), middle = take_byte(in);
    const int64_t bytes = outer * layout->size * inner * item;
    unsigned char *full = malloc((size_t)bytes), *shard = malloc((size_t)bytes);
    unsigned char *back = calloc(1, (size_t)bytes), *copied = calloc(1, (size_t)bytes);
    unsigned char *windows = calloc(1, (size_t)bytes);
    const int64_t half = bytes / 2;
    REQUIRE(full != NULL && shard != NULL && back != NULL && windows != NULL);
    REQUIRE(copied != NULL);
    fill(full, bytes);
    for (int rank = 0; rank < layout->ranks; rank++) {
        const runs own = runs_of(layout, rank);
        const tp_shard_view view = {outer, layout->size, inner,
                                    item,  own.values,   own.count};
        tp_error err = TP_NO_ERROR;
        REQUIRE(tp_shard_check(&view, outer * layout->size * inner,
                               outer * layout->shards[rank].width * inner, &err) == 0);
        REQUIRE(tp_shard_disjoint(&view, &err) == 0);
        cut(&view, full, bytes, middle, shard);
        check_copies(&view, full, shard, copied);
        tp_shard_unpack(&view, back, shard, 0, tp_shard_bytes(&view));
        tp_shard_unpack_window(&view, windows, shard, 0, half);
        tp_shard_unpack_window(&view, windows + half, shard, half, bytes);
    }
    REQUIRE(memcmp(full, back, (size_t)bytes) == 0);
    REQUIRE(memcmp(full, copied, (size_t)bytes) == 0);
    REQUIRE(memcmp(full, windows, (size_t)bytes) == 0);
    free(full);
    free(shard);
    free(back);
    free(copied);
    free(windows);
}

/* Each new shard is made out of old ones as it would be packed from the weight. */
static void
check_reshard(const tp_layout *old, const tp_layout *new)
{
    runs held[MOST_RANKS];
    tp_run_list lists[MOST_RANKS];
    for (int rank = 0; rank < old->ranks; rank++) {
        held[rank] = runs_of(old, rank);
        lists[rank] = (tp_run_list){held[rank].values, held[rank].count};
    }
    for (int rank = 0; rank < new->ranks; rank++) {
        const runs target = runs_of(new, rank);
        tp_error err = TP_NO_ERROR;
        tp_reshard_copy *copies = NULL;
        int count = 0, copy = 0;
        REQUIRE(tp_reshard(lists, old->ranks,
                           (tp_run_list){target.values, target.count}, &copies, &count,
                           &err) == 0);
        int64_t to = 0, done = 0;
        for (int i = 0; i < target.count; i += 2)
            for (int64_t at = 0; at < target.values[i + 1]; at++, to++) {
                REQUIRE(copy < count && copies[copy].to + done == to);
                const runs *from = &held[copies[copy].rank];
                int64_t offset = copies[copy].from + done;
                int k = 0;
                while (k < from->count && offset >= from->values[k + 1]) {
                    offset -= from->values[k + 1];
                    k += 2;
                }
                REQUIRE(k < from->count);
                REQUIRE(from->values[k] + offset == target.values[i] + at);
                if (++done == copies[copy].length) {
                    copy++;
                    done = 0;
                }
            }
        REQUIRE(copy == count && to == new->shards[rank].width);
        free(copies);
    }
}

/* Runs as a checkpoint may state them. */
static void
try_any_runs(input *in)
{
    int64_t values[4][6];
    tp_run_list lists[4];
    tp_error err = TP_NO_ERROR;
    tp_reshard_copy *copies = NULL;
    int count = 0;
    for (int i = 0; i < 4; i++) {
        lists[i] = (tp_run_list){values[i], take_int(in, 0, 6)};
        for (int k = 0; k < lists[i].count; k++)
            values[i][k] = take_size(in);
    }
    if (is_done(tp_reshard(lists, 3, lists[3], &copies, &count, &err), &err)) {
        int64_t to = 0;
        for (int i = 0; i < count; i++) {
            REQUIRE(copies[i].to == to && copies[i].length > 0 && copies[i].from >= 0);
            to += copies[i].length;
        }
        free(copies);
    }
    tp_shard_view view = {.item = 1, .runs = values[3], .values = lists[3].count};
    view.outer = take_size(in);
    view.size = take_size(in);
    view.inner = take_size(in);
    const int64_t full = take_size(in);
    const int64_t own = take_size(in);
    if (is_done(tp_shard_check(&view, full, own, &err), &err))
        is_done(tp_shard_disjoint(&view, &err), &err);
}

static void
try_pieces(input *in)
{
    tp_piece pieces[MOST_PIECES];
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = NULL;
    tp_layout_cache *old_cache = NULL, *new_cache = NULL;
    const tp_layout *old = NULL, *new = NULL, *again = NULL;
    const int count = take_int(in, 1, MOST_PIECES);
    const int64_t key = take_int(in, 1, 6);
    const tp_heads heads = {key * take_int(in, 1, 6), key};
    for (int i = 0; i < count; i++) {
        pieces[i].role = (tp_piece_role)take_int(in, 0, TP_PIECE_KEY);
        pieces[i].unit = take_bool(in) ? take_size(in) : take_int(in, 1, 4);
        const int64_t units = pieces[i].role == TP_PIECE_QUERY ? heads.query
                              : pieces[i].role == TP_PIECE_KEY ? heads.key
                                                               : take_size(in);
        if (take_int(in, 0, 7) == 7 ||
            __builtin_mul_overflow(units, pieces[i].unit, &pieces[i].size))
            pieces[i].size = take_size(in);
    }
    REQUIRE(tp_arena_new(&arena, &err) == 0);
    REQUIRE(tp_layout_cache_new(arena, take_int(in, 1, MOST_RANKS), &old_cache, &err) ==
            0);
    REQUIRE(tp_layout_cache_new(arena, take_int(in, 1, MOST_RANKS), &new_cache, &err) ==
            0);
    if (is_done(tp_layout_cache_get(old_cache, pieces, count, heads, &old, &err),
                &err)) {
        REQUIRE(tp_layout_cache_get(old_cache, pieces, count, heads, &again, &err) ==
                0);
        REQUIRE(again == old && tp_layout_cache_count(old_cache) == 1);
        for (int rank = 0; rank < old->ranks; rank++)
            check_shard(old, rank);
        if (old->size <= MOST_SIZE) {
            check_owners(old);
            check_gather(in, old);
        }
        if (is_done(tp_layout_cache_get(new_cache, pieces, count, heads, &new, &err),
                    &err) &&
            old->size <= MOST_SIZE)
            check_reshard(old, new);
    }
    tp_layout_cache_free(old_cache);
    tp_layout_cache_free(new_cache);
    tp_arena_free(arena);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = input_of(data, size);
    if (take_int(&in, 0, 3) == 3)
        try_any_runs(&in);
    else
        try_pieces(&in);
    input_end(&in);
    return 0;
}
