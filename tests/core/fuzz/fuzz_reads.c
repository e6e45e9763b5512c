/* SPDX-License-Identifier: Apache-2.0 */
/* Slices of tensors in files, and in which order they are read. */
#include "input.h"
#include "reads/read_plan.h"

enum {
    MOST_BOXES = 5,
    MOST_READS = 1 << 12,  /* of a box that is tried at all */
    MOST_ELEMENTS = 1 << 9 /* of the boxes that are compared element by element */
};

/* An element goes from a byte of a file to a byte of memory. */
typedef struct {
    int file;
    int64_t from, to;
} move;

static tp_box
take_box(input *in)
{
    tp_box box = {0};
    box.file = take_int(in, 0, 2);
    box.dims = take_int(in, 0, TP_MAX_DIMS);
    if (take_int(in, 0, 31) == 31)
        box.dims = take_int(in, -1, TP_MAX_DIMS + 1);
    const bool dense = take_bool(in);
    box.begin = take_size(in);
    box.item = take_bool(in) ? take_size(in) : 4;
    box.out_begin = take_size(in);
    int64_t stride = 1;
    for (int i = TP_MAX_DIMS - 1; i >= 0; i--) {
        if (i >= box.dims)
            continue;
        box.shape[i] = take_bool(in) ? take_size(in) : take_int(in, 1, 4);
        box.starts[i] = take_bool(in) ? take_size(in) : 0;
        box.lengths[i] = take_bool(in) ? take_size(in) : box.shape[i];
        box.out_strides[i] = dense ? stride : take_size(in);
        if (__builtin_mul_overflow(stride, box.lengths[i], &stride))
            stride = 1;
    }
    return box;
}

/* Elements in all but the last dimension, and in all; -1: more than 64 bits hold. */
static int64_t
elements(const tp_box *box, int dims)
{
    int64_t count = 1;
    for (int i = 0; i < dims && i < TP_MAX_DIMS; i++)
        if (box->lengths[i] < 0 ||
            __builtin_mul_overflow(count, box->lengths[i], &count))
            return -1;
    return count;
}

static int
compare_moves(const void *left, const void *right)
{
    const move *a = left, *b = right;
    if (a->to != b->to)
        return a->to < b->to ? -1 : 1;
    if (a->file != b->file)
        return a->file < b->file ? -1 : 1;
    return (a->from > b->from) - (a->from < b->from);
}

/* From the definition of a box, element by element. */
static int
moves_of_box(const tp_box *box, move *out)
{
    const int64_t all = elements(box, box->dims);
    for (int64_t i = 0; i < all; i++) {
        int64_t left = i, from = 0, to = box->out_begin, stride = 1;
        for (int dim = box->dims - 1; dim >= 0; dim--) {
            const int64_t at = left % box->lengths[dim];
            left /= box->lengths[dim];
            from += (box->starts[dim] + at) * stride;
            to += at * box->out_strides[dim];
            stride *= box->shape[dim];
        }
        out[i] = (move){box->file, box->begin + from * box->item, to * box->item};
    }
    return (int)all;
}

static int
moves_of_read(const tp_read *read, int64_t item, move *out)
{
    int count = 0;
    for (int64_t row = 0; row < read->rows; row++)
        for (int64_t at = 0; at < read->row_bytes; at += item)
            out[count++] = (move){read->file, read->begin + row * read->stride + at,
                                  read->out_begin + row * read->out_stride + at};
    return count;
}

/* The reads move each element of the boxes once, and nothing else. */
static void
check_moves(const tp_box *boxes, int count, const tp_read_plan *plan)
{
    move *wanted = calloc(MOST_ELEMENTS, sizeof(*wanted));
    move *found = calloc(MOST_ELEMENTS, sizeof(*found));
    REQUIRE(wanted != NULL && found != NULL);
    int moves = 0, made = 0;
    for (int i = 0; i < count; i++)
        moves += moves_of_box(&boxes[i], wanted + moves);
    for (int64_t i = 0; i < plan->reads.count; i++) {
        const tp_read *read = &plan->reads.items[i];
        const int64_t item = boxes[read->box].item;
        REQUIRE(read->row_bytes > 0 && read->row_bytes % item == 0);
        REQUIRE(made + read->rows * (read->row_bytes / item) <= moves);
        made += moves_of_read(read, item, found + made);
    }
    REQUIRE(made == moves);
    qsort(wanted, (size_t)moves, sizeof(*wanted), compare_moves);
    qsort(found, (size_t)moves, sizeof(*found), compare_moves);
    for (int i = 0; i < moves; i++)
        REQUIRE(compare_moves(&wanted[i], &found[i]) == 0);
    free(wanted);
    free(found);
}

/* Every read is in one span of its file, and spans are in order, with more than the
 * gap between them. */
static void
check_spans(const tp_read_plan *plan, int64_t gap)
{
    for (int64_t i = 1; i < plan->span_count; i++) {
        const tp_span *before = &plan->spans[i - 1], *span = &plan->spans[i];
        REQUIRE(before->file < span->file ||
                (before->file == span->file && span->begin - before->end > gap));
    }
    int64_t bytes = 0;
    for (int64_t i = 0; i < plan->reads.count; i++) {
        const tp_read *read = &plan->reads.items[i];
        const int64_t end =
            read->begin + (read->rows - 1) * read->stride + read->row_bytes;
        int holders = 0;
        for (int64_t k = 0; k < plan->span_count; k++) {
            const tp_span *span = &plan->spans[k];
            holders += span->file == read->file && span->begin <= read->begin &&
                       end <= span->end;
        }
        REQUIRE(holders == 1);
        REQUIRE(!__builtin_add_overflow(bytes, read->rows * read->row_bytes, &bytes));
    }
    REQUIRE(plan->bytes == bytes);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = input_of(data, size);
    tp_error err = TP_NO_ERROR;
    tp_read_plan plan = TP_NO_READ_PLAN;
    tp_box boxes[MOST_BOXES];
    const int count = take_int(&in, 0, MOST_BOXES);
    const int64_t gap = take_size(&in);
    bool few = true, small = true;
    int64_t all = 0;
    for (int i = 0; i < count; i++) {
        boxes[i] = take_box(&in);
        const int64_t reads = elements(&boxes[i], boxes[i].dims - 1);
        const int64_t own = elements(&boxes[i], boxes[i].dims);
        few = few && reads <= MOST_READS;
        small =
            small && own >= 0 && own <= MOST_ELEMENTS && (all += own) <= MOST_ELEMENTS;
    }
    if (few && is_done(tp_read_plan_make(boxes, count, gap, &plan, &err), &err)) {
        if (plan.reads.count <= MOST_ELEMENTS)
            check_spans(&plan, gap);
        if (small)
            check_moves(boxes, count, &plan);
    }
    tp_read_plan_clear(&plan);
    input_end(&in);
    return 0;
}
