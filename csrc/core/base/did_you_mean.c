/* SPDX-License-Identifier: Apache-2.0 */
/* did_you_mean.c -- the names closest to an unknown name. */
#include "base/did_you_mean.h"

#include <stdlib.h>
#include <string.h>

#define LONGEST 128

/* More suggestions than this are a list, not a hint. */
#define SUGGESTIONS 3

/* A name in lower case. */
typedef struct {
    char data[LONGEST + 1];
    int size;
} folded;

static bool
fold(const char *name, folded *out)
{
    int size = 0;
    for (; name[size] != '\0'; size++) {
        if (size == LONGEST)
            return false;
        out->data[size] = tp_text_lower(name[size]);
    }
    out->data[size] = '\0';
    out->size = size;
    return true;
}

static int
smaller(int a, int b)
{
    return a < b ? a : b;
}

/* https://en.wikipedia.org/wiki/Damerau-Levenshtein_distance, the variant that
 * edits no substring twice. Three rows, because a swap looks two rows back. */
static int
distance(const folded *a, const folded *b)
{
    int rows[3][LONGEST + 1];
    for (int j = 0; j <= b->size; j++)
        rows[0][j] = j;

    for (int i = 1; i <= a->size; i++) {
        int *now = rows[i % 3];
        const int *before = rows[(i + 2) % 3];
        const int *two_before = rows[(i + 1) % 3];
        now[0] = i;
        for (int j = 1; j <= b->size; j++) {
            const bool same = a->data[i - 1] == b->data[j - 1];
            now[j] = smaller(smaller(before[j], now[j - 1]) + 1,
                             before[j - 1] + (same ? 0 : 1));
            if (i > 1 && j > 1 && a->data[i - 1] == b->data[j - 2] &&
                a->data[i - 2] == b->data[j - 1])
                now[j] = smaller(now[j], two_before[j - 2] + 1);
        }
    }
    return rows[a->size % 3][b->size];
}

/* The distance, or -1 when the two are not near. */
static int
near_distance(const folded *wanted, const char *name)
{
    folded other;
    if (!fold(name, &other))
        return -1;
    /* The empty text is part of every name, which says nothing about them. */
    const bool inside = wanted->size > 0 && other.size > 0 &&
                        (strstr(other.data, wanted->data) != NULL ||
                         strstr(wanted->data, other.data) != NULL);
    const int longer = wanted->size > other.size ? wanted->size : other.size;
    const int bound = longer / 3 > 2 ? longer / 3 : 2;
    /* The lengths alone rule most names out before the quadratic part. */
    if (!inside && abs(wanted->size - other.size) > bound)
        return -1;
    const int apart = distance(wanted, &other);
    return inside || apart <= bound ? apart : -1;
}

int
tp_did_you_mean(const char *name, const char *const *names, int count, int limit,
                int *found)
{
    folded wanted;
    if (limit <= 0 || !fold(name, &wanted))
        return 0;

    int total = 0;
    for (int i = 0; i < count; i++) {
        const int apart = near_distance(&wanted, names[i]);
        if (apart < 0)
            continue;
        int at = total;
        while (at > 0 && near_distance(&wanted, names[found[at - 1]]) > apart)
            at--;
        if (at == limit)
            continue;
        if (total < limit)
            total++;
        memmove(&found[at + 1], &found[at], (size_t)(total - at - 1) * sizeof(*found));
        found[at] = i;
    }
    return total;
}

void
tp_did_you_mean_add(tp_text *text, const char *name, const char *const *names,
                    int count)
{
    int found[SUGGESTIONS];
    const int near = tp_did_you_mean(name, names, count, SUGGESTIONS, found);
    if (near == 0) {
        for (int i = 0; i < count; i++)
            tp_text_add(text, "%s%s", i == 0 ? "; known: " : ", ", names[i]);
        return;
    }
    tp_text_add(text, "; did you mean '%s'", names[found[0]]);
    for (int i = 1; i < near; i++)
        tp_text_add(text, "%s'%s'", i == near - 1 ? " or " : ", ", names[found[i]]);
    tp_text_add(text, "?");
}
