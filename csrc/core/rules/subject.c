/* SPDX-License-Identifier: Apache-2.0 */
/* subject.c -- a name that rules are tried on, looked at once for all of them. */
#include "rules/subject.h"

#include <string.h>

/* Looks at the text from `from` on. Without an early end, because names are nearly
 * always printable. */
static void
look_at(tp_subject *subject, size_t from)
{
    const char *text = subject->text;
    unsigned outside = 0;
    for (size_t i = from; i < subject->size; i++) {
        outside |= (unsigned)((unsigned char)(text[i] - ' ') > '~' - ' ');
        subject->pairs |= i == 0 ? 0 : tp_pairs_of(text[i - 1], text[i]);
    }
    subject->printable = subject->printable && outside == 0;
}

tp_subject
tp_subject_of(const char *text, size_t size)
{
    tp_subject subject = {.text = text, .size = size, .printable = true};
    look_at(&subject, 0);
    return subject;
}

tp_subject
tp_subject_after(const tp_subject *start, const char *text, size_t size)
{
    if (size < start->size || memcmp(text, start->text, start->size) != 0)
        return tp_subject_of(text, size);
    tp_subject subject = *start;
    subject.text = text;
    subject.size = size;
    look_at(&subject, start->size);
    return subject;
}
