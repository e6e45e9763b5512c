/* SPDX-License-Identifier: Apache-2.0 */
/* regex.h -- patterns with exactly the results of Python's re.match.
 *
 * A pattern made only of constructs that PCRE2 and Python read alike runs in
 * PCRE2 with JIT; any other pattern, and any subject that is not printable
 * ASCII, goes to the fallback, which is the compiled Python pattern and has no
 * bound of its own: PCRE2 goes first there, to see whether the search ends. What
 * PCRE2 cannot read is refused where tp_guard_choices finds more than one.
 * Whether a pattern is valid at all is Python's decision, taken before it
 * comes here. */
#ifndef TP_REGEX_H
#define TP_REGEX_H

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"
#include "rules/subject.h"

typedef struct tp_regex tp_regex;

/* The compiled Python pattern. `match` returns 1, 0, or -1 with `err` filled. */
typedef struct {
    void *context; /* owned by the regex from tp_regex_new on, even if it fails */
    int (*match)(void *context, const char *subject, size_t size, tp_error *err);
    void (*release)(void *context);
} tp_matcher;

/* Fails for what is too long for a pattern, before Python reads it, which takes long.
 */
int tp_regex_check_size(const char *pattern, tp_error *err);

/* `fallback` may be NULL for patterns of our own tables; a pattern that needs
 * it then fails with TP_BUG. */
int tp_regex_new(const char *pattern, const tp_matcher *fallback, tp_regex **out,
                 tp_error *err);

/* How long the matches of a plan may still take: each ends in a few milliseconds, and
 * a large model has many. One that takes more than 2,500 steps counts as 1, more than
 * 25,000 as 11, more than 250,000, which PCRE2 alone may take, as 111, and nearly all
 * count as 0. */
typedef struct {
    int left;
} tp_long_matches;

/* Whether `subject` matches at its start. A pattern that backtracks
 * without end fails with TP_LIMIT, naming pattern and subject. */
int tp_regex_match(const tp_regex *regex, const tp_subject *subject, bool *matched,
                   tp_error *err);

/* The same, where a long match is counted; TP_LIMIT where it may not be long any more.
 * NULL: any number may. */
int tp_regex_match_counted(const tp_regex *regex, const tp_subject *subject,
                           tp_long_matches *matches, bool *matched, tp_error *err);

/* The pattern as given; borrowed. */
const char *tp_regex_pattern(const tp_regex *regex);

/* Whether PCRE2 decides; otherwise the fallback does. */
bool tp_regex_is_native(const tp_regex *regex);

void tp_regex_free(tp_regex *regex);

#endif
