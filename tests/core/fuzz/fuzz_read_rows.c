/* SPDX-License-Identifier: Apache-2.0 */
/* Rows of files that are other than their headers say. */
#define _GNU_SOURCE /* memfd_create */

#include "files/read_rows.h"

#include <sys/mman.h>
#include <unistd.h>

#include "input.h"

enum { MOST_MEMORY = 1 << 18, LONGEST_FILE = 1 << 17 };

static unsigned char
byte_at(int64_t offset)
{
    return (unsigned char)(offset * 7 + offset / 251);
}

/* A file in memory of `size` bytes. */
static int
make_file(int64_t size)
{
    static unsigned char content[LONGEST_FILE];
    const int fd = memfd_create("rows", 0);
    REQUIRE(fd >= 0 && size <= LONGEST_FILE);
    for (int64_t i = 0; i < size; i++)
        content[i] = byte_at(i);
    REQUIRE(write(fd, content, (size_t)size) == size);
    return fd;
}

/* begin + (rows - 1) * stride + bytes, as read.cpp checks it; -1: too much. */
static int64_t
end_of(int64_t begin, int64_t rows, int64_t bytes, int64_t stride)
{
    int64_t end = 0;
    if (begin < 0 || rows < 1 || bytes < 0 || stride < 0 ||
        __builtin_mul_overflow(rows - 1, stride, &end) ||
        __builtin_add_overflow(end, begin, &end) ||
        __builtin_add_overflow(end, bytes, &end))
        return -1;
    return end;
}

static int64_t
take_length(input *in)
{
    const int kind = take_byte(in);
    return kind < 128 ? kind : kind < 250 ? take_short(in) : take_size(in);
}

static tp_rows
take_rows(input *in)
{
    tp_rows rows;
    rows.begin = take_length(in);
    rows.rows = take_byte(in);
    rows.bytes = take_length(in);
    rows.stride = take_length(in);
    rows.out_stride = take_length(in);
    return rows;
}

static void
check_rows(const tp_rows *rows, const unsigned char *out)
{
    for (int64_t row = 0; row < rows->rows; row++)
        for (int64_t i = 0; i < rows->bytes; i++)
            REQUIRE(rows->out_stride < rows->bytes ||
                    out[row * rows->out_stride + i] ==
                        byte_at(rows->begin + row * rows->stride + i));
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = input_of(data, size);
    tp_error err = TP_NO_ERROR;
    const int kind = take_byte(&in);
    const int64_t length = take_short(&in);
    const tp_rows rows = take_rows(&in);
    const int64_t room = end_of(0, rows.rows, rows.bytes, rows.out_stride);
    const int64_t end = end_of(rows.begin, rows.rows, rows.bytes, rows.stride);
    if (room >= 0 && room <= MOST_MEMORY && end >= 0) {
        unsigned char *out = malloc((size_t)room + 1);
        const int fd = make_file(length);
        REQUIRE(out != NULL);
        if (kind == 255)
            close(fd);
        const bool read = is_done(tp_read_rows(fd, "file", &rows, out, &err), &err);
        REQUIRE(read == (kind != 255 && end <= length) || rows.bytes == 0);
        if (read)
            check_rows(&rows, out);
        free(out);
        if (kind != 255)
            close(fd);
    }
    input_end(&in);
    return 0;
}
