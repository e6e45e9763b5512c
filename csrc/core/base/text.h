/* SPDX-License-Identifier: Apache-2.0 */
/* text.h -- a growable string for messages and labels.
 *
 * Appending never reports failure; a text that once ran out of memory stays
 * failed, and tp_text_take says so. One check at the end instead of many. */
#ifndef TP_TEXT_H
#define TP_TEXT_H

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"

typedef struct {
    char *data; /* owned, NUL-terminated once anything was added */
    size_t size;
    size_t room;
    bool failed;
} tp_text;

#define TP_NO_TEXT        \
    {                     \
        NULL, 0, 0, false \
    }

void tp_text_add(tp_text *text, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Hand the string over to the caller, who frees it; the text is empty again.
 * Fails with TP_MEMORY. */
int tp_text_take(tp_text *text, char **out, tp_error *err);

/* Fill `err` with `code` and the text as its message, empty the text. Always returns
 * -1. Runs out of memory as TP_MEMORY. */
int tp_text_fail(tp_text *text, tp_code code, tp_error *err);

void tp_text_free(tp_text *text);

/* Whether `letter` is one of those of `set`; the end of a string is none. */
bool tp_text_is_one_of(char letter, const char *set);

/* The small letter of an ASCII letter; any other character as it is. */
char tp_text_lower(char letter);

/* Whether two names are equal without regard to the case of ASCII letters, whatever
 * locale the process is in. */
bool tp_text_same(const char *a, const char *b);

#endif
