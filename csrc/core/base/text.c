/* SPDX-License-Identifier: Apache-2.0 */
/* text.c -- a growable string for messages and labels. */
#include "base/text.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Room for `more` bytes and the NUL behind them. */
static bool
reserve(tp_text *text, size_t more)
{
    if (more > SIZE_MAX / 2 - text->size - 1)
        return false;
    const size_t need = text->size + more + 1;
    if (need <= text->room)
        return true;

    size_t room = text->room < 64 ? 64 : text->room;
    while (room < need)
        room *= 2;
    char *data = realloc(text->data, room);
    if (data == NULL)
        return false;
    text->data = data;
    text->room = room;
    return true;
}

void
tp_text_add(tp_text *text, const char *format, ...)
{
    if (text->failed)
        return;

    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    const int size = vsnprintf(NULL, 0, format, arguments);
    if (size < 0 || !reserve(text, (size_t)size)) {
        text->failed = true;
    } else {
        vsnprintf(text->data + text->size, (size_t)size + 1, format, again);
        text->size += (size_t)size;
    }
    va_end(again);
    va_end(arguments);
}

int
tp_text_take(tp_text *text, char **out, tp_error *err)
{
    *out = NULL;
    tp_text_add(text, "%s", ""); /* an empty text is "", not NULL */
    if (text->failed) {
        tp_text_free(text);
        return tp_fail_memory(err);
    }
    *out = text->data;
    *text = (tp_text)TP_NO_TEXT;
    return 0;
}

int
tp_text_fail(tp_text *text, tp_code code, tp_error *err)
{
    char *message = NULL;
    if (tp_text_take(text, &message, err) < 0)
        return -1;
    tp_fail(err, code, "%s", message);
    free(message);
    return -1;
}

void
tp_text_free(tp_text *text)
{
    free(text->data);
    *text = (tp_text)TP_NO_TEXT;
}

bool
tp_text_is_one_of(char letter, const char *set)
{
    return letter != '\0' && strchr(set, letter) != NULL;
}

char
tp_text_lower(char letter)
{
    return letter >= 'A' && letter <= 'Z' ? (char)(letter - 'A' + 'a') : letter;
}

bool
tp_text_same(const char *a, const char *b)
{
    while (*a != '\0' && tp_text_lower(*a) == tp_text_lower(*b)) {
        a++;
        b++;
    }
    return *a == *b;
}
