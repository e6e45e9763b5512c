/* SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE /* mkstemp */
#include "files/read_rows.h"

#include <stdlib.h>
#include <unistd.h>

#include "check.h"

#define SIZE ((int64_t)3 << 20)

static char content[SIZE];

static int
open_file(void)
{
    char path[] = "/tmp/autotp-read-XXXXXX";
    const int fd = mkstemp(path);
    unlink(path);
    for (int64_t i = 0; i < SIZE; i++)
        content[i] = (char)(i * 7 + i / 509);
    if (write(fd, content, SIZE) != (ssize_t)SIZE)
        abort();
    return fd;
}

static int
wrong_rows(const tp_rows *rows, const char *out)
{
    int wrong = 0;
    for (int64_t i = 0; i < rows->rows; i++)
        wrong +=
            memcmp(out + i * rows->out_stride, content + rows->begin + i * rows->stride,
                   (size_t)rows->bytes) != 0;
    return wrong;
}

static void
test_rows_of_any_length_are_read(void)
{
    tp_error err = TP_NO_ERROR;
    const int fd = open_file();
    /* Mapped, mapped from the middle of a page, one by one, and in one piece. */
    const tp_rows cases[] = {
        {0, 700, 100, 4096, 100},         {5001, 700, 3, 4097, 11},
        {12345, 30, 20000, 90000, 20001}, {1, 1, SIZE - 1, 0, 0},
        {SIZE - 10, 1, 10, 0, 0},
    };
    char *out = malloc(SIZE);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        memset(out, 0, SIZE);
        CHECK_OK(tp_read_rows(fd, "file", &cases[i], out, &err), &err);
        CHECK_INT_EQ(wrong_rows(&cases[i], out), 0);
    }
    free(out);
    close(fd);
}

static void
test_rows_of_one_place_are_read_as_often_as_they_are_asked_for(void)
{
    tp_error err = TP_NO_ERROR;
    const int fd = open_file();
    const tp_rows same = {5001, 3, 7, 0, 7};
    char out[21] = {0};
    CHECK_OK(tp_read_rows(fd, "file", &same, out, &err), &err);
    CHECK_INT_EQ(wrong_rows(&same, out), 0);
    close(fd);
}

static void
test_a_file_that_ends_too_soon_is_an_error(void)
{
    tp_error err = TP_NO_ERROR;
    const int fd = open_file();
    char *out = malloc(SIZE);
    const tp_rows mapped = {0, 800, 100, 4096, 100}, whole = {0, 1, SIZE + 1, 0, 0};
    CHECK(tp_read_rows(fd, "file", &mapped, out, &err) < 0);
    CHECK_TEXT_EQ(tp_error_text(&err),
                  "file cannot be read: it has become shorter than its header says");
    char *more = malloc(SIZE + 1);
    CHECK(tp_read_rows(fd, "file", &whole, more, &err) < 0);
    close(fd);
    CHECK(tp_read_rows(-1, "file", &whole, more, &err) < 0);
    CHECK_TEXT_EQ(tp_error_text(&err), "file cannot be read: Bad file descriptor");
    CHECK(tp_read_rows(-1, "file", &mapped, more, &err) < 0);
    tp_error_clear(&err);
    free(more);
    free(out);
}

int
main(void)
{
    RUN(test_rows_of_any_length_are_read);
    RUN(test_rows_of_one_place_are_read_as_often_as_they_are_asked_for);
    RUN(test_a_file_that_ends_too_soon_is_an_error);
    return check_result();
}
