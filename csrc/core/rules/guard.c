/* SPDX-License-Identifier: Apache-2.0 */
/* guard.c -- a pattern of Python as PCRE2 searches it in as many steps. */
#include "rules/guard.h"

#include <stdbool.h>
#include <string.h>

/* The bytes of an escape, the name of "\N{name}" included, or of one character. */
static size_t
size_of_literal(const char *at)
{
    if (at[0] != '\\' || at[1] == '\0')
        return 1;
    const char *end = at[1] == 'N' && at[2] == '{' ? strchr(at, '}') : NULL;
    return end != NULL ? (size_t)(end - at) + 1 : 2;
}

/* The bytes of a class, whose first member may be a bracket. */
static size_t
size_of_class(const char *at)
{
    const char *end = at + 1 + (at[1] == '^');
    end += *end == ']';
    while (*end != '\0' && *end != ']')
        end += size_of_literal(end);
    return (size_t)(end - at) + (*end == ']');
}

static size_t
size_of_element(const char *at)
{
    return *at == '[' ? size_of_class(at) : size_of_literal(at);
}

/* The bytes of "(?flags)" or "(?flags:", or 0 for any other group. */
static size_t
size_of_flags(const char *at)
{
    if (at[0] != '(' || at[1] != '?')
        return 0;
    const size_t flags = strspn(at + 2, "aiLmsux-");
    return flags > 0 && tp_text_is_one_of(at[2 + flags], ":)") ? flags + 3 : 0;
}

/* Without "a", "L" and "u", which PCRE2 does not have: letters of which language
 * are letters changes no number of steps worth counting. */
static void
add_flags(tp_text *out, const char *at, size_t size)
{
    const char end = at[size - 1];
    bool any = end == ':';
    for (size_t i = 2; i + 1 < size; i++)
        any = any || tp_text_is_one_of(at[i], "imsx");
    if (!any)
        return;
    tp_text_add(out, "(?");
    for (size_t i = 2; i + 1 < size; i++) {
        if (tp_text_is_one_of(at[i], "imsx") ||
            (at[i] == '-' && tp_text_is_one_of(at[i + 1], "imsx")))
            tp_text_add(out, "%c", at[i]);
    }
    tp_text_add(out, "%c", end);
}

/* Whether it is "{,n}" or "{,}", which older versions of PCRE2 read as text. */
static bool
is_open_repeat(const char *at)
{
    return at[0] == '{' && at[1] == ',' && at[2 + strspn(at + 2, "0123456789")] == '}';
}

void
tp_guard_add(tp_text *out, const char *pattern)
{
    for (const char *at = pattern; *at != '\0';) {
        const size_t flags = size_of_flags(at);
        const size_t size = flags > 0 ? flags : size_of_element(at);
        if (flags > 0)
            add_flags(out, at, flags);
        else if (is_open_repeat(at))
            tp_text_add(out, "{0");
        else
            tp_text_add(out, "%.*s", (int)size, at);
        at += size;
    }
}

/* The bytes of a repeat: "*", "+", "?", "{n}", "{n,}", "{,n}", "{n,m}" or "{,}", all
 * others being text; or 0. */
static size_t
size_of_repeat(const char *at)
{
    if (at[0] != '{')
        return tp_text_is_one_of(at[0], "*+?");
    const size_t least = strspn(at + 1, "0123456789");
    const char *end = at + 1 + least;
    if (*end == ',')
        end += 1 + strspn(end + 1, "0123456789");
    else if (least == 0)
        return 0;
    return *end == '}' ? (size_t)(end - at) + 1 : 0;
}

/* Whether a repeat is "{n}", which leaves no choice. */
static bool
is_exact_repeat(const char *at)
{
    return at[0] == '{' && at[1 + strspn(at + 1, "0123456789")] == '}';
}

int
tp_guard_choices(const char *pattern)
{
    int count = 0, exact = 0;
    bool repeats = false; /* what is just before */
    for (const char *at = pattern; *at != '\0';) {
        if (at[0] == '(' && at[1] == '?') {
            at += 2; /* the mark of a group */
            repeats = false;
            continue;
        }
        const size_t size = size_of_repeat(at);
        /* "+?" and "++" are one repeat each. */
        const bool is_more = repeats && tp_text_is_one_of(*at, "?+");
        if (size > 0 && !is_more && is_exact_repeat(at))
            exact++;
        else if (*at == '|' || (size > 0 && !is_more))
            count++;
        repeats = size > 0;
        at += size > 0 ? size : size_of_element(at);
    }
    return count > 0 ? count + exact : 0;
}

/* What "{n" says, which ends behind it; at most `most`. */
static int64_t
least_count(const char *at, int64_t most)
{
    int64_t count = 0;
    for (at++; *at >= '0' && *at <= '9' && count < most; at++)
        count = count * 10 + (*at - '0');
    return count < most ? count : most;
}

/* Whether blanks and comments may be before a repeat: "(?x)", "(?ix:". */
static bool
is_verbose(const char *pattern)
{
    for (const char *at = pattern; *at != '\0'; at += size_of_element(at)) {
        const size_t size = size_of_flags(at);
        if (size > 0 && memchr(at, 'x', size) != NULL)
            return true;
    }
    return false;
}

int64_t
tp_guard_rounds(const char *pattern, int64_t most)
{
    const bool verbose = is_verbose(pattern);
    bool is_group = false; /* what is just before */
    int64_t rounds = 1;
    for (const char *at = pattern; *at != '\0';) {
        const size_t repeat = *at == '{' ? size_of_repeat(at) : 0;
        const int64_t count = repeat > 0 ? least_count(at, most) : 0;
        if (count > 1 && (is_group || verbose))
            rounds = rounds > most / count ? most : rounds * count;
        /* A reference to a group, as "\12", may be as empty as that group. */
        is_group = *at == ')' || (*at == '\\' && at[1] >= '1' && at[1] <= '9') ||
                   (is_group && *at >= '0' && *at <= '9');
        at += repeat > 0 ? repeat : size_of_element(at);
    }
    return rounds;
}
