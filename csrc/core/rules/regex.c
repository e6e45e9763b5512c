/* SPDX-License-Identifier: Apache-2.0 */
/* regex.c -- patterns with exactly the results of Python's re.match.
 *
 * A regex has up to two programs of PCRE2: the native one, whose result counts,
 * and the guard, which runs before the fallback and of which nothing counts but
 * that it ran out of steps. A pattern that has neither, because PCRE2 refuses it,
 * is refused here as well, unless it can be seen that Python comes to an end.
 *
 * Nothing in a regex changes after tp_regex_new, and each match has its own
 * match data, so one regex serves any number of threads. PCRE2 counts each
 * step of its search, compiled or not, and stops at a bound; the JIT code runs
 * on the 32 KiB of machine stack that PCRE2 gives it, and where that is too
 * little the interpreter, which keeps its state on the heap, takes over. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "rules/regex.h"

#include <pcre2.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/text.h"
#include "rules/guard.h"
#include "rules/scan.h"

/* A step reads one character, or as many as ".*" takes; so many are read in 10 ms
 * at most, by Python in ten times as many, which gets a tenth of the steps. A name
 * takes a few hundred. */
#define MOST_READ 20000000
#define MOST_STEPS 500000
#define MOST_STEPS_OF_PYTHON 50000

/* What is repeated without reading may take no step of PCRE2, but some of Python: as
 * many as the pattern has rounds, see tp_guard_rounds, for each character and each
 * step. */
#define MOST_ROUNDS 1000
#define MOST_READ_IN_ROUNDS 100000

/* What is no name any more, nor a pattern for names. */
#define LONGEST_SUBJECT 32768
#define LONGEST_PATTERN 65536

/* Steps of a match that is not long, see tp_long_matches; each longer one may take
 * ten times as many, and is counted as that. */
#define FEW_STEPS 2500

/* KiB of state for the interpreter; a name takes a few. */
#define MOST_HEAP 65536

/* As much of a pattern or subject as a message shows. */
#define SHOWN 300

struct tp_regex {
    char *pattern;       /* owned */
    pcre2_code *native;  /* owned; NULL: the fallback decides */
    pcre2_code *guard;   /* owned; NULL: there is none */
    int64_t rounds;      /* of Python in each step of the guard */
    tp_pairs required;   /* by every match; none outside the subset */
    tp_matcher fallback; /* owned; `match` is NULL when there is none */
};

/* Both programs are anchored, without PCRE2's start optimisations: an anchored
 * match gains little from what it finds out about first and last characters, and
 * 10.42 gets it wrong after a lookahead: it says that "(?=a)b*a$" does not
 * match "a". */
static const uint32_t common_options = PCRE2_ANCHORED | PCRE2_NO_START_OPTIMIZE;

static const uint32_t native_options = PCRE2_NO_AUTO_CAPTURE;

/* As Python reads a pattern for str. Repeats stay as they are written: Python
 * turns none of them into possessive ones, so the guard may not, either. */
static const uint32_t guard_options =
    PCRE2_UTF | PCRE2_UCP | PCRE2_ALT_BSUX | PCRE2_NO_AUTO_POSSESS;

static int
shown(size_t size)
{
    return size < SHOWN ? (int)size : SHOWN;
}

/* NULL where PCRE2 refuses the pattern or has no memory for it: Python can still
 * try. */
static pcre2_code *
compile(const char *pattern, uint32_t options)
{
    pcre2_compile_context *settings = pcre2_compile_context_create(NULL);
    if (settings == NULL)
        return NULL;
    /* What a build of PCRE2 takes for a newline is its own choice. */
    pcre2_set_newline(settings, PCRE2_NEWLINE_LF);
    int code;
    size_t offset;
    pcre2_code *compiled =
        pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                      common_options | options, &code, &offset, settings);
    pcre2_compile_context_free(settings);
    /* Not every platform lets a process write code; slower is fine. */
    if (compiled != NULL)
        pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);
    return compiled;
}

/* The guard is of the pattern as PCRE2 reads it. */
static int
compile_guard(tp_regex *regex, tp_error *err)
{
    tp_text text = TP_NO_TEXT;
    char *pattern = NULL;
    tp_guard_add(&text, regex->pattern);
    if (tp_text_take(&text, &pattern, err) < 0)
        return -1;
    regex->guard = compile(pattern, guard_options);
    free(pattern);
    return 0;
}

static int
set_rounds(tp_regex *regex, tp_error *err)
{
    regex->rounds = tp_guard_rounds(regex->pattern, MOST_STEPS_OF_PYTHON);
    if (regex->rounds > MOST_ROUNDS)
        return tp_fail(err, TP_VALUE,
                       "pattern '%.*s' repeats groups %s%lld times, one within "
                       "another, expected at most %d; write it with fewer",
                       shown(strlen(regex->pattern)), regex->pattern,
                       regex->rounds == MOST_STEPS_OF_PYTHON ? "at least " : "",
                       (long long)regex->rounds, MOST_ROUNDS);
    return 0;
}

static int
prepare(tp_regex *regex, tp_error *err)
{
    if (tp_scan(regex->pattern, &regex->required))
        regex->native = compile(regex->pattern, native_options);
    if (regex->fallback.match == NULL)
        return 0;
    if (compile_guard(regex, err) < 0)
        return -1;
    regex->rounds = 1;
    /* In the common subset, what is repeated reads. */
    if (regex->native == NULL && set_rounds(regex, err) < 0)
        return -1;
    if (regex->guard == NULL && tp_guard_choices(regex->pattern) > 1)
        return tp_fail(
            err, TP_VALUE,
            "pattern '%.*s' may backtrack without end, which cannot be ruled out for "
            "what PCRE2 does not read, as \\N{...}, repeats of more than 65535 and "
            "names of groups of more than 32 characters; write it without these",
            shown(strlen(regex->pattern)), regex->pattern);
    return 0;
}

int
tp_regex_check_size(const char *pattern, tp_error *err)
{
    const size_t size = strlen(pattern);
    if (size <= LONGEST_PATTERN)
        return 0;
    return tp_fail(err, TP_VALUE,
                   "pattern '%.*s...' has %zu bytes, expected at most %d", shown(size),
                   pattern, size, LONGEST_PATTERN);
}

int
tp_regex_new(const char *pattern, const tp_matcher *fallback, tp_regex **out,
             tp_error *err)
{
    *out = NULL;
    tp_regex *regex = calloc(1, sizeof(*regex));
    if (regex == NULL) {
        if (fallback != NULL)
            fallback->release(fallback->context);
        return tp_fail_memory(err);
    }
    if (fallback != NULL)
        regex->fallback = *fallback;

    const size_t size = strlen(pattern);
    regex->pattern = malloc(size + 1);
    if (regex->pattern == NULL) {
        tp_fail_memory(err);
        goto failed;
    }
    memcpy(regex->pattern, pattern, size + 1);
    if (prepare(regex, err) < 0)
        goto failed;
    if (regex->native == NULL && fallback == NULL) {
        tp_fail(err, TP_BUG, "pattern '%s' is outside what PCRE2 and Python read alike",
                pattern);
        goto failed;
    }
    *out = regex;
    return 0;

failed:
    tp_regex_free(regex);
    return -1;
}

/* Steps that a match on `size` characters may take. On thousands of them a search
 * without choices takes thousands of steps. */
static uint32_t
steps_for(size_t size, uint32_t most)
{
    const uint32_t steps = (uint32_t)(MOST_READ / (size + 1)), least = most / 8;
    if (steps < least)
        return least;
    return steps < most ? steps : most;
}

/* PCRE2's result: positive for a match, or a negative code. */
static int
run(const pcre2_code *code, const tp_subject *subject, uint32_t steps)
{
    int result = PCRE2_ERROR_NOMEMORY;
    /* Room for the whole match alone; two allocations of some 100 bytes. */
    pcre2_match_data *data = pcre2_match_data_create(1, NULL);
    pcre2_match_context *limits = pcre2_match_context_create(NULL);
    if (data != NULL && limits != NULL) {
        const PCRE2_SPTR text = (PCRE2_SPTR)subject->text;
        pcre2_set_match_limit(limits, steps_for(subject->size, steps));
        pcre2_set_heap_limit(limits, MOST_HEAP);
        result = pcre2_match(code, text, subject->size, 0, 0, data, limits);
        if (result == PCRE2_ERROR_JIT_STACKLIMIT)
            result =
                pcre2_match(code, text, subject->size, 0, PCRE2_NO_JIT, data, limits);
    }
    pcre2_match_context_free(limits);
    pcre2_match_data_free(data);
    /* 0 is a match with more groups than there is room for. */
    return result == 0 ? 1 : result;
}

static bool
is_limit(int result)
{
    return result == PCRE2_ERROR_MATCHLIMIT || result == PCRE2_ERROR_DEPTHLIMIT ||
           result == PCRE2_ERROR_HEAPLIMIT;
}

/* In the place of a result of PCRE2, whose own are above: the pattern may be harmless,
 * but no long match is left to it. */
#define NO_LONG_MATCH_LEFT (-10000)

/* As run, where long matches are counted: first with few steps, then with more. */
static int
run_counted(const pcre2_code *code, const tp_subject *subject, uint32_t most,
            tp_long_matches *matches)
{
    uint32_t steps = matches == NULL || most < FEW_STEPS ? most : FEW_STEPS;
    int result = run(code, subject, steps);
    for (int cost = 1; is_limit(result) && steps < most; cost *= 10) {
        if (matches->left < cost)
            return NO_LONG_MATCH_LEFT;
        matches->left -= cost;
        steps = steps < most / 10 ? steps * 10 : most;
        result = run(code, subject, steps);
    }
    return result;
}

static int
fail_match(const tp_regex *regex, const tp_subject *subject, int result, tp_error *err)
{
    const int pattern_shown = shown(strlen(regex->pattern));
    const int subject_shown = shown(subject->size);
    if (result == PCRE2_ERROR_NOMEMORY)
        return tp_fail_memory(err);
    if (result == NO_LONG_MATCH_LEFT)
        return tp_fail(
            err, TP_LIMIT,
            "pattern '%.*s' gave up on '%.*s', since all long matches of the plan "
            "together took too long: this pattern or others before it have nested or "
            "neighbouring repeats such as (a+)* or .*.*.*, which share the same text "
            "in many ways; write them with fewer of these",
            pattern_shown, regex->pattern, subject_shown, subject->text);
    if (!is_limit(result))
        return tp_fail(err, TP_BUG, "PCRE2 error %d for pattern '%.*s' on '%.*s'",
                       result, pattern_shown, regex->pattern, subject_shown,
                       subject->text);
    return tp_fail(
        err, TP_LIMIT,
        "pattern '%.*s' gave up on '%.*s' after too many steps: write it so that "
        "nested or neighbouring repeats such as (a+)* or .*.*.* cannot share "
        "the same text in many ways",
        pattern_shown, regex->pattern, subject_shown, subject->text);
}

/* Python decides, once PCRE2 has seen that it will come to an end. */
static int
match_fallback(const tp_regex *regex, const tp_subject *subject,
               tp_long_matches *matches, bool *matched, tp_error *err)
{
    const tp_matcher *fallback = &regex->fallback;
    if (regex->rounds > 1 &&
        (int64_t)subject->size > MOST_READ_IN_ROUNDS / regex->rounds)
        return fail_match(regex, subject, PCRE2_ERROR_MATCHLIMIT, err);
    if (regex->guard != NULL) {
        const uint32_t steps = (uint32_t)(MOST_STEPS_OF_PYTHON / regex->rounds);
        const int result = run_counted(regex->guard, subject, steps, matches);
        if (is_limit(result) || result == NO_LONG_MATCH_LEFT)
            return fail_match(regex, subject, result, err);
    }
    const int found =
        fallback->match(fallback->context, subject->text, subject->size, err);
    *matched = found > 0;
    return found < 0 ? -1 : 0;
}

int
tp_regex_match_counted(const tp_regex *regex, const tp_subject *subject,
                       tp_long_matches *matches, bool *matched, tp_error *err)
{
    *matched = false;
    if ((regex->required & ~subject->pairs) != 0)
        return 0;
    if (subject->size > LONGEST_SUBJECT)
        return tp_fail(
            err, TP_VALUE,
            "pattern '%.*s' was given '%.*s...' of %zu bytes, expected a name "
            "of at most %d",
            shown(strlen(regex->pattern)), regex->pattern, shown(subject->size),
            subject->text, subject->size, LONGEST_SUBJECT);
    if (regex->native == NULL || (regex->fallback.match != NULL && !subject->printable))
        return match_fallback(regex, subject, matches, matched, err);
    const int result = run_counted(regex->native, subject, MOST_STEPS, matches);
    if (result < 0 && result != PCRE2_ERROR_NOMATCH)
        return fail_match(regex, subject, result, err);
    *matched = result > 0;
    return 0;
}

int
tp_regex_match(const tp_regex *regex, const tp_subject *subject, bool *matched,
               tp_error *err)
{
    return tp_regex_match_counted(regex, subject, NULL, matched, err);
}

const char *
tp_regex_pattern(const tp_regex *regex)
{
    return regex->pattern;
}

bool
tp_regex_is_native(const tp_regex *regex)
{
    return regex->native != NULL;
}

void
tp_regex_free(tp_regex *regex)
{
    if (regex == NULL)
        return;
    if (regex->fallback.match != NULL)
        regex->fallback.release(regex->fallback.context);
    pcre2_code_free(regex->native);
    pcre2_code_free(regex->guard);
    free(regex->pattern);
    free(regex);
}
