/* SPDX-License-Identifier: Apache-2.0 */
/* regex_fixture.h -- a fallback that counts, for the tests of patterns. */
#ifndef TP_REGEX_FIXTURE_H
#define TP_REGEX_FIXTURE_H

#include <stdlib.h>
#include <time.h>

#include "check.h"
#include "rules/regex.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* Stands for the compiled Python pattern: counts what it is asked. */
typedef struct {
    int answer;
    int asked;
    int released;
} witness;

static inline int
witness_match(void *context, const char *subject, size_t size, tp_error *err)
{
    witness *self = context;
    (void)subject;
    (void)size;
    self->asked++;
    return self->answer < 0 ? tp_fail(err, TP_RAISED, "raised") : self->answer;
}

static inline void
witness_release(void *context)
{
    witness *self = context;
    self->released++;
}

static inline tp_matcher
matcher_of(witness *self)
{
    return (tp_matcher){self, witness_match, witness_release};
}

static inline int
match_text(const tp_regex *regex, const char *text, size_t size, bool *matched,
           tp_error *err)
{
    const tp_subject subject = tp_subject_of(text, size);
    return tp_regex_match(regex, &subject, matched, err);
}

#endif
