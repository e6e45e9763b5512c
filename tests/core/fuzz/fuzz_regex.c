/* SPDX-License-Identifier: Apache-2.0 */
/* Patterns and the names that they are tried on. */
#include "input.h"
#include "rules/guard.h"
#include "rules/regex.h"
#include "rules/scan.h"

static int
answer(void *context, const char *subject, size_t size, tp_error *err)
{
    (void)err;
    return *(const bool *)context && size > 0 && subject[0] != '\0';
}

static void
release(void *context)
{
    (void)context;
}

/* The pairs of characters spare a match that would fail, and no other. What the
 * fallback says is not of the pattern here. */
static void
try_on(const tp_regex *regex, const tp_subject *subject, bool native)
{
    tp_error err = TP_NO_ERROR;
    tp_subject any = *subject;
    bool matched = false, without = false;
    any.pairs = ~(tp_pairs)0;
    if (!is_done(tp_regex_match(regex, &any, &without, &err), &err))
        return;
    REQUIRE(tp_regex_match(regex, subject, &matched, &err) == 0);
    REQUIRE(!native || matched == without);
}

/* Text that is looked at in two steps is seen as in one. */
static void
look_twice(const tp_subject *subject, size_t first)
{
    const tp_subject start =
        tp_subject_of(subject->text, first < subject->size ? first : subject->size);
    const tp_subject whole = tp_subject_after(&start, subject->text, subject->size);
    REQUIRE(whole.pairs == subject->pairs && whole.printable == subject->printable);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = input_of(data, size);
    tp_error err = TP_NO_ERROR;
    tp_regex *regex = NULL;
    tp_pairs required = 0;
    size_t length = 0;
    const int flags = take_byte(&in);
    bool yes = (flags & 2) != 0;
    const tp_matcher fallback = {&yes, answer, release};
    const char *pattern = take_line(&in);
    const char *text = take_rest(&in, &length);
    const bool common = tp_scan(pattern, &required);
    const int made =
        tp_regex_new(pattern, (flags & 1) != 0 ? &fallback : NULL, &regex, &err);
    if (made == 0) {
        const tp_subject subject = tp_subject_of(text, length);
        REQUIRE(common || !tp_regex_is_native(regex));
        look_twice(&subject, (size_t)flags >> 2);
        try_on(regex, &subject,
               tp_regex_is_native(regex) && ((flags & 1) == 0 || subject.printable));
        tp_regex_free(regex);
    } else {
        /* Only patterns of our own have no fallback; others are refused where nothing
         * tells whether they come to an end. */
        REQUIRE(err.code == ((flags & 1) == 0 ? TP_BUG : TP_VALUE));
        REQUIRE((flags & 1) == 0 || tp_guard_choices(pattern) > 1);
        tp_error_clear(&err);
    }
    input_end(&in);
    return 0;
}
