/* SPDX-License-Identifier: Apache-2.0 */
/* read_rows.c -- rows of bytes of a file copied into memory. */
#define _DEFAULT_SOURCE /* madvise */
#include "files/read_rows.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Below this a row is copied out of the mapped file. 200 MB in rows from a warm cache,
 * seconds by system calls and mapped, on a CPU of 2026: rows of 1 KiB 0.48 and 0.26, of
 * 4 KiB 0.38 and 0.31, of 16 KiB 0.26 and 0.28. Reading whole blocks of rows and
 * leaving out what is between them takes as long as mapping, but reads that as well.
 * Large pages for the memory make a read 3 times as fast while there are free ones, and
 * twice as slow where the page cache has left none: 1.1 GB in 1.0 s without, 2.4 s. */
#define MAPPED_BELOW (16 << 10)
/* So much of a file is mapped at once, or one row. */
#define WINDOW ((int64_t)64 << 20)
/* Linux reads no more by one call. */
#define AT_ONCE ((int64_t)1 << 30)
static int
fail(const char *path, const char *why, tp_error *err)
{
    return tp_fail(err, TP_VALUE, "%s cannot be read: %s", path, why);
}

static int
read_bytes(int fd, const char *path, int64_t begin, int64_t bytes, char *out,
           tp_error *err)
{
    while (bytes > 0) {
        const int64_t most = bytes < AT_ONCE ? bytes : AT_ONCE;
        const ssize_t got = pread(fd, out, (size_t)most, (off_t)begin);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return fail(path, strerror(errno), err);
        if (got == 0)
            return fail(path, "it has become shorter than its header says", err);
        begin += got;
        out += got;
        bytes -= got;
    }
    return 0;
}

/* Rows that are within a window of the file. */
static int
copy_mapped(int fd, const char *path, const tp_rows *rows, char *out, tp_error *err)
{
    const int64_t page = (int64_t)sysconf(_SC_PAGESIZE);
    const int64_t aligned = rows->begin / page * page;
    const int64_t end = rows->begin + (rows->rows - 1) * rows->stride + rows->bytes;
    void *mapped =
        mmap(NULL, (size_t)(end - aligned), PROT_READ, MAP_PRIVATE, fd, (off_t)aligned);
    if (mapped == MAP_FAILED)
        return fail(path, strerror(errno), err);
    madvise(mapped, (size_t)(end - aligned), MADV_SEQUENTIAL);
    const char *from = (const char *)mapped + (rows->begin - aligned);
    for (int64_t i = 0; i < rows->rows; i++)
        memcpy(out + i * rows->out_stride, from + i * rows->stride,
               (size_t)rows->bytes);
    munmap(mapped, (size_t)(end - aligned));
    return 0;
}

/* A mapped page that the file no longer has would be a signal, not an error. */
static int
check_size(int fd, const char *path, const tp_rows *rows, tp_error *err)
{
    struct stat status;
    if (fstat(fd, &status) < 0)
        return fail(path, strerror(errno), err);
    if (rows->begin + (rows->rows - 1) * rows->stride + rows->bytes > status.st_size)
        return fail(path, "it has become shorter than its header says", err);
    return 0;
}

int
tp_read_rows(int fd, const char *path, const tp_rows *rows, void *out, tp_error *err)
{
    char *to = out;
    if (rows->bytes >= MAPPED_BELOW || rows->rows == 1) {
        for (int64_t i = 0; i < rows->rows; i++)
            if (read_bytes(fd, path, rows->begin + i * rows->stride, rows->bytes,
                           to + i * rows->out_stride, err) < 0)
                return -1;
        return 0;
    }
    if (check_size(fd, path, rows, err) < 0)
        return -1;
    int64_t some = rows->rows; /* of one and the same place */
    if (rows->stride > 0)
        some = rows->stride < WINDOW ? WINDOW / rows->stride : 1;
    for (int64_t i = 0; i < rows->rows; i += some) {
        tp_rows part = *rows;
        part.begin += i * rows->stride;
        part.rows = rows->rows - i < some ? rows->rows - i : some;
        if (copy_mapped(fd, path, &part, to + i * rows->out_stride, err) < 0)
            return -1;
    }
    return 0;
}
