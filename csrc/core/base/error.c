/* SPDX-License-Identifier: Apache-2.0 */
/* error.c -- what went wrong, in words meant for the user. */
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

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
    return message;
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
