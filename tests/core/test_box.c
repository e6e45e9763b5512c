/* SPDX-License-Identifier: Apache-2.0 */
#include "reads/box.h"

#include <stdlib.h>

#include "check.h"

#define MOST 4096

static uint32_t state = 1;

static int64_t
draw(int64_t least, int64_t most)
{
    state = state * 1664525u + 1013904223u;
    return least + (int64_t)(state >> 8) % (most - least + 1);
}

/* A box of random sizes, which goes to a memory of its own in any order of dimensions.
 */
static tp_box
random_box(void)
{
    tp_box box = {0};
    int order[TP_MAX_DIMS];
    box.dims = (int)draw(0, 4);
    box.begin = draw(0, 9);
    box.item = draw(1, 4);
    for (int dim = 0; dim < box.dims; dim++) {
        box.shape[dim] = draw(1, 5);
        box.starts[dim] = draw(0, box.shape[dim] - 1);
        box.lengths[dim] = draw(1, box.shape[dim] - box.starts[dim]);
        if (draw(0, 1) == 0) {
            box.starts[dim] = 0;
            box.lengths[dim] = box.shape[dim];
        }
        order[dim] = dim;
    }
    if (draw(0, 2) == 0 && box.dims > 1) {
        order[0] = 1;
        order[1] = 0;
    }
    int64_t stride = 1;
    for (int i = box.dims - 1; i >= 0; i--) {
        box.out_strides[order[i]] = stride;
        stride *= box.lengths[order[i]] + (draw(0, 3) == 0);
    }
    box.out_begin = draw(0, 3);
    return box;
}

/* Where element `index` of a box is: in the file and in the memory, in bytes. */
static void
place(const tp_box *box, const int64_t *index, int64_t *from, int64_t *to)
{
    int64_t stride = 1;
    *from = 0;
    *to = box->out_begin;
    for (int dim = box->dims - 1; dim >= 0; dim--) {
        *from += (box->starts[dim] + index[dim]) * stride;
        *to += index[dim] * box->out_strides[dim];
        stride *= box->shape[dim];
    }
    *from = box->begin + *from * box->item;
    *to *= box->item;
}

/* Elements of the box that `memory` does not have from `file`. */
static int
missing(const tp_box *box, const char *file, const char *memory)
{
    int64_t index[TP_MAX_DIMS] = {0};
    int wrong = 0, dim = 0;
    do {
        int64_t from, to;
        place(box, index, &from, &to);
        wrong += memcmp(file + from, memory + to, (size_t)box->item) != 0;
        dim = box->dims - 1;
        while (dim >= 0 && ++index[dim] == box->lengths[dim])
            index[dim--] = 0;
    } while (dim >= 0);
    return wrong;
}

static void
test_reads_bring_each_element_to_its_place_once(void)
{
    tp_error err = TP_NO_ERROR;
    static char file[MOST], memory[4 * MOST];
    for (int i = 0; i < MOST; i++)
        file[i] = (char)(i * 31 + i / 256);
    for (int round = 0; round < 3000; round++) {
        const tp_box box = random_box();
        tp_reads reads = TP_NO_READS;
        if (!CHECK_OK(tp_box_reads(&box, 3, &reads, &err), &err))
            return;
        int64_t bytes = 0, expected = box.item, last = -1;
        for (int dim = 0; dim < box.dims; dim++)
            expected *= box.lengths[dim];
        memset(memory, 0, sizeof(memory));
        for (int64_t i = 0; i < reads.count; i++) {
            const tp_read *r = &reads.items[i];
            for (int64_t row = 0; row < r->rows; row++)
                memcpy(memory + r->out_begin + row * r->out_stride,
                       file + r->begin + row * r->stride, (size_t)r->row_bytes);
            bytes += r->rows * r->row_bytes;
            CHECK(r->box == 3 && r->begin > last);
            last = r->begin;
        }
        CHECK_INT_EQ(bytes, expected);
        CHECK_INT_EQ(missing(&box, file, memory), 0);
        tp_reads_clear(&reads);
    }
}

static void
test_what_lies_side_by_side_is_one_row(void)
{
    tp_error err = TP_NO_ERROR;
    tp_reads reads = TP_NO_READS;
    /* Rows 2 to 4 of [8, 6], then columns 3 to 5, then columns of a stack of matrices.
     */
    const tp_box boxes[] = {
        {0, 2, 100, 2, {8, 6}, {2, 0}, {3, 6}, 0, {6, 1}},
        {0, 2, 100, 2, {8, 6}, {0, 3}, {8, 3}, 0, {3, 1}},
        {0, 3, 100, 2, {5, 8, 6}, {0, 0, 3}, {5, 8, 3}, 0, {24, 3, 1}},
    };
    for (int i = 0; i < 3; i++)
        CHECK_OK(tp_box_reads(&boxes[i], i, &reads, &err), &err);
    CHECK_INT_EQ(reads.count, 3);
    CHECK_INT_EQ(reads.items[0].rows, 1);
    CHECK_INT_EQ(reads.items[0].row_bytes, 36);
    CHECK_INT_EQ(reads.items[1].rows, 8);
    CHECK_INT_EQ(reads.items[1].stride, 12);
    CHECK_INT_EQ(reads.items[1].row_bytes, 6);
    CHECK_INT_EQ(reads.items[2].rows, 40);
    tp_reads_clear(&reads);
}

static void
test_a_box_outside_of_its_tensor_is_refused(void)
{
    tp_error err = TP_NO_ERROR;
    tp_reads reads = TP_NO_READS;
    const tp_box beyond = {0, 1, 0, 2, {8}, {6}, {3}, 0, {1}};
    CHECK(tp_box_reads(&beyond, 0, &reads, &err) < 0);
    CHECK_TEXT_EQ(
        tp_error_text(&err),
        "dimension 0 of a tensor has 8 elements, but 3 from 6 on are to be read");
    const tp_box large = {0, 2, 0, 2, {INT64_MAX / 2, 4}, {0, 0}, {1, 1}, 0, {1, 1}};
    CHECK(tp_box_reads(&large, 0, &reads, &err) < 0);
    CHECK_TEXT_EQ(tp_error_text(&err), "a tensor has 2^63 bytes or more");
    const tp_box far = {0, 1, 0, 2, {8}, {0}, {8}, 0, {INT64_MAX / 4}};
    CHECK(tp_box_reads(&far, 0, &reads, &err) < 0);
    const tp_box empty = {0, 2, 0, 2, {8, 0}, {0, 0}, {8, 0}, 0, {1, 1}};
    CHECK_INT_EQ(tp_box_reads(&empty, 0, &reads, &err), 0);
    CHECK_INT_EQ(reads.count, 0);
    tp_error_clear(&err);
    tp_reads_clear(&reads);
}

static void
test_a_place_beyond_what_can_be_counted_is_refused(void)
{
    tp_error err = TP_NO_ERROR;
    tp_reads reads = TP_NO_READS;
    const tp_box boxes[] = {
        {0, 1, 0, 1, {8}, {0}, {8}, INT64_MAX - 7, {1}},
        {0, 1, 0, 2, {8}, {0}, {8}, INT64_MAX - 8, {1}},
        {0, 1, 0, 1, {8}, {0}, {8}, -1, {1}},
        {0, 1, 0, 1, {8}, {0}, {8}, 0, {-1}},
    };
    for (size_t i = 0; i < sizeof(boxes) / sizeof(boxes[0]); i++)
        CHECK_FAILS(tp_box_reads(&boxes[i], 0, &reads, &err), TP_VALUE, &err,
                    "the place of a slice has a negative stride, or 2^63 bytes");
    tp_reads_clear(&reads);
}

int
main(void)
{
    RUN(test_reads_bring_each_element_to_its_place_once);
    RUN(test_what_lies_side_by_side_is_one_row);
    RUN(test_a_box_outside_of_its_tensor_is_refused);
    RUN(test_a_place_beyond_what_can_be_counted_is_refused);
    return check_result();
}
