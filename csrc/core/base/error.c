/* SPDX-License-Identifier: Apache-2.0 */
/* error.c -- what went wrong, in words meant for the user. */
#include "base/error.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A name in a message may be of any length: more than this is left out in the middle.
 */
#define LONGEST 16384
#define LAST (LONGEST / 4)
#define LEFT_OUT " ... "

/* The bytes of what a terminal obeys in the place of showing it, or 0: control
 * characters but for the ends of lines, and marks of the writing direction. */
static size_t
unprintable(const unsigned char *at, unsigned *code)
{
    *code = at[0];
    if (at[0] < ' ' || at[0] == 0x7f)
        return at[0] != '\n';
    if ((at[0] & 0xe0) == 0xc0 && (at[1] & 0xc0) == 0x80) {
        *code = (unsigned)(at[0] & 0x1f) << 6 | (at[1] & 0x3f);
        return *code <= 0x9f || *code == 0x61c ? 2 : 0;
    }
    if (at[0] == 0xe2 && (at[1] & 0xc0) == 0x80 && (at[2] & 0xc0) == 0x80) {
        *code = 0x2000 | (unsigned)(at[1] & 0x3f) << 6 | (at[2] & 0x3f);
        const bool is_mark = (*code >= 0x200e && *code <= 0x200f) ||
                             (*code >= 0x2028 && *code <= 0x202e) ||
                             (*code >= 0x2066 && *code <= 0x2069);
        return is_mark ? 3 : 0;
    }
    return 0;
}

/* `message` without its middle where it is long. */
static void
shorten(char *message)
{
    const size_t size = strlen(message);
    if (size <= LONGEST)
        return;
    const size_t mark = strlen(LEFT_OUT), first = LONGEST - LAST - mark;
    memcpy(message + first, LEFT_OUT, mark);
    memmove(message + first + mark, message + size - LAST, LAST + 1);
}

/* `message`, which is freed where it is not the result, with escapes for what a
 * terminal obeys; NULL without memory. */
static char *
printable(char *message)
{
    shorten(message);
    const unsigned char *bytes = (const unsigned char *)message;
    size_t found = 0;
    unsigned code;
    for (size_t i = 0; bytes[i] != '\0'; i++)
        found += unprintable(bytes + i, &code) > 0;
    if (found == 0)
        return message;

    const size_t room = strlen(message) + found * strlen("\\u0000") + 1;
    char *made = malloc(room), *end = made;
    for (const unsigned char *at = bytes; made != NULL && *at != '\0';) {
        const size_t size = unprintable(at, &code);
        if (size > 0)
            end += snprintf(end, room - (size_t)(end - made),
                            code > 0xff ? "\\u%04x" : "\\x%02x", code);
        else
            *end++ = (char)*at;
        at += size > 0 ? size : 1;
    }
    if (made != NULL)
        *end = '\0';
    free(message);
    return made;
}

static char *
format_message(const char *format, va_list arguments)
{
    va_list again;
    va_copy(again, arguments);
    const int size = vsnprintf(NULL, 0, format, again);
    va_end(again);
    if (size < 0)
        return NULL;

    char *message = malloc((size_t)size + 1);
    if (message != NULL)
        vsnprintf(message, (size_t)size + 1, format, arguments);
    return message == NULL ? NULL : printable(message);
}

int
tp_fail(tp_error *err, tp_code code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    char *message = format_message(format, arguments);
    va_end(arguments);

    /* Cleared only now: the arguments may include the old message. */
    tp_error_clear(err);
    err->code = message != NULL ? code : TP_MEMORY;
    err->message = message;
    return -1;
}

int
tp_fail_memory(tp_error *err)
{
    tp_error_clear(err);
    err->code = TP_MEMORY;
    return -1;
}

const char *
tp_error_text(const tp_error *err)
{
    if (err->message != NULL)
        return err->message;
    if (err->code == TP_OK)
        return "no error";
    return err->code == TP_RAISED ? "a callback raised an exception" : "out of memory";
}

void
tp_error_clear(tp_error *err)
{
    free(err->message);
    err->code = TP_OK;
    err->message = NULL;
}
