/* SPDX-License-Identifier: Apache-2.0 */
/* tp_size.c -- the TP size that everything that states it agrees on. */
#include "config/tp_size.h"

#include <inttypes.h>

static int64_t
effective(int64_t size)
{
    return size == 0 ? 1 : size;
}

/* The first source that states a size, or NULL. */
static const tp_size_source *
first_stated(const tp_size_source *sources, int count)
{
    for (int i = 0; i < count; i++) {
        if (sources[i].size >= 0)
            return &sources[i];
    }
    return NULL;
}

bool
tp_size_differs(const tp_size_source *sources, int count)
{
    const tp_size_source *first = first_stated(sources, count);
    for (int i = 0; first != NULL && i < count; i++) {
        if (sources[i].size >= 0 &&
            effective(sources[i].size) != effective(first->size))
            return true;
    }
    return false;
}

/* Those that state `size`, or those that state another one. */
static void
add_sources(tp_text *text, const tp_size_source *sources, int count, int64_t size,
            bool equal, const char *before)
{
    for (int i = 0; i < count; i++) {
        if (sources[i].size < 0 || (effective(sources[i].size) == size) != equal)
            continue;
        tp_text_add(text, "%s%s is %" PRId64, before, sources[i].where,
                    sources[i].size);
        before = ", ";
    }
}

void
tp_size_add_sources(tp_text *text, const tp_size_source *sources, int count)
{
    const tp_size_source *first = first_stated(sources, count);
    tp_text_add(text, "TP size: ");
    if (first == NULL)
        return;
    add_sources(text, sources, count, effective(first->size), true, "");
    add_sources(text, sources, count, effective(first->size), false, ", but ");
}

int
tp_size_settle(const tp_size_source *sources, int count, int64_t *size, tp_error *err)
{
    const tp_size_source *first = first_stated(sources, count);
    if (!tp_size_differs(sources, count)) {
        *size = first == NULL ? -1 : effective(first->size);
        return 0;
    }
    tp_text text = TP_NO_TEXT;
    tp_size_add_sources(&text, sources, count);
    tp_text_add(&text, "; give it in one place, or the same size everywhere");
    return tp_text_fail(&text, TP_VALUE, err);
}
