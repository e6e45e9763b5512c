/* SPDX-License-Identifier: Apache-2.0 */
/* guard.h -- a pattern of Python as PCRE2 searches it in as many steps.
 *
 * What the search finds does not count, only how long it takes. */
#ifndef TP_GUARD_H
#define TP_GUARD_H

#include <stdint.h>

#include "base/text.h"

/* Add to `out` what PCRE2 reads as Python reads `pattern`, which Python has
 * accepted: "{0,3}" for "{,3}", and no flags that are about Python's types of
 * strings alone. */
void tp_guard_add(tp_text *out, const char *pattern);

/* In how many places of `pattern` a search goes on in one of several ways: its
 * repeats and alternatives; 0 where all repeats are like "{3}". With one at most, it
 * ends after as many steps as a name has characters, or one for each of their pairs. */
int tp_guard_choices(const char *pattern);

/* How often at least Python goes through a group that `pattern` repeats, as in
 * "(?:(?=a){100}){3}", where PCRE2 goes once: 300; at most `most`. */
int64_t tp_guard_rounds(const char *pattern, int64_t most);

#endif
