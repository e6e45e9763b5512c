/* SPDX-License-Identifier: Apache-2.0 */
/* regex.c -- patterns with exactly the results of Python's re.match.
 *
 * Nothing in a regex changes after tp_regex_new, and each match has its own
 * match data, so one regex serves any number of threads. PCRE2 counts each
 * step of its search, compiled or not, and stops at a bound; the JIT code runs
 * on the 32 KiB of machine stack that PCRE2 gives it, and where that is too
 * little the interpreter, which keeps its state on the heap, takes over. */
#define _GNU_SOURCE /* memmem */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "regex.h"

#include <pcre2.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "scan.h"

/* A name takes a few hundred steps; a million is a few milliseconds. */
#define MOST_STEPS 1000000

/* KiB of state for the interpreter; a name takes a few. */
#define MOST_HEAP 65536

/* As much of a pattern or subject as a message shows. */
#define SHOWN 300

struct tp_regex {
    char *pattern; /* owned */
    char *literal; /* owned; every match contains it */
    size_t literal_size;
    pcre2_code *code;            /* owned; NULL: the fallback runs it */
    pcre2_match_context *limits; /* owned */
    bool jit;
    tp_matcher fallback; /* owned; `match` is NULL when there is none */
};

/* PCRE2_NO_START_OPTIMIZE: an anchored match gains little from what PCRE2 finds
 * out about first and last characters, and 10.42 gets it wrong after a lookahead:
 * it says that "(?=a)b*a$" does not match "a". */
static pcre2_code *
compile(const char *pattern)
{
    pcre2_compile_context *settings = pcre2_compile_context_create(NULL);
    if (settings == NULL)
        return NULL;
    /* What a build of PCRE2 takes for a newline is its own choice. */
    pcre2_set_newline(settings, PCRE2_NEWLINE_LF);
    const uint32_t options =
        PCRE2_ANCHORED | PCRE2_NO_AUTO_CAPTURE | PCRE2_NO_START_OPTIMIZE;
    int code;
    size_t offset;
    pcre2_code *compiled = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                         options, &code, &offset, settings);
    pcre2_compile_context_free(settings);
    return compiled;
}

/* Leaves `code` NULL where Python has to run the pattern. */
static int
prepare(tp_regex *regex, tp_error *err)
{
    const size_t size = strlen(regex->pattern);
    regex->literal = malloc(size + 1);
    if (regex->literal == NULL)
        return tp_fail_memory(err);
    if (!tp_scan(regex->pattern, regex->literal, &regex->literal_size))
        return 0;
    /* Larger than PCRE2 takes, or out of memory: Python can still try. */
    regex->code = compile(regex->pattern);
    if (regex->code == NULL)
        return 0;

    regex->limits = pcre2_match_context_create(NULL);
    if (regex->limits == NULL)
        return tp_fail_memory(err);
    pcre2_set_match_limit(regex->limits, MOST_STEPS);
    pcre2_set_heap_limit(regex->limits, MOST_HEAP);
    /* Not every platform lets a process write code; slower is fine. */
    regex->jit = pcre2_jit_compile(regex->code, PCRE2_JIT_COMPLETE) == 0;
    return 0;
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
    if (regex->code == NULL && fallback == NULL) {
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

static bool
is_printable_ascii(const char *subject, size_t size)
{
    /* Without an early end, so that the compiler can take many at a time. */
    unsigned outside = 0;
    for (size_t i = 0; i < size; i++)
        outside |= (unsigned)((unsigned char)(subject[i] - ' ') > '~' - ' ');
    return outside == 0;
}

static int
shown(size_t size)
{
    return size < SHOWN ? (int)size : SHOWN;
}

static int
fail_match(const tp_regex *regex, const char *subject, size_t size, int code,
           tp_error *err)
{
    const int pattern_shown = shown(strlen(regex->pattern));
    switch (code) {
        case PCRE2_ERROR_NOMEMORY:
            return tp_fail_memory(err);
        case PCRE2_ERROR_MATCHLIMIT:
        case PCRE2_ERROR_DEPTHLIMIT:
        case PCRE2_ERROR_HEAPLIMIT:
            return tp_fail(err, TP_LIMIT,
                           "pattern '%.*s' gave up on '%.*s' after %d steps: write it "
                           "so that nested or neighbouring repeats such as (a+)* or "
                           ".*.*.* cannot share the same text in many ways",
                           pattern_shown, regex->pattern, shown(size), subject,
                           MOST_STEPS);
        default:
            return tp_fail(err, TP_BUG, "PCRE2 error %d for pattern '%.*s' on '%.*s'",
                           code, pattern_shown, regex->pattern, shown(size), subject);
    }
}

/* PCRE2's result: positive for a match, or a negative code. */
static int
run(const tp_regex *regex, const char *subject, size_t size)
{
    /* Room for the whole match alone; one allocation of some 100 bytes. */
    pcre2_match_data *data = pcre2_match_data_create(1, NULL);
    if (data == NULL)
        return PCRE2_ERROR_NOMEMORY;
    int code = PCRE2_ERROR_JIT_STACKLIMIT;
    if (regex->jit)
        code = pcre2_jit_match(regex->code, (PCRE2_SPTR)subject, size, 0, 0, data,
                               regex->limits);
    if (code == PCRE2_ERROR_JIT_STACKLIMIT)
        code = pcre2_match(regex->code, (PCRE2_SPTR)subject, size, 0, PCRE2_NO_JIT,
                           data, regex->limits);
    pcre2_match_data_free(data);
    return code;
}

int
tp_regex_match(const tp_regex *regex, const char *subject, size_t size, bool *matched,
               tp_error *err)
{
    *matched = false;
    /* Holds for every text, because the literal is part of any match. */
    if (regex->code != NULL && regex->literal_size > 0 &&
        memmem(subject, size, regex->literal, regex->literal_size) == NULL)
        return 0;

    const tp_matcher *fallback = &regex->fallback;
    const bool native = regex->code != NULL &&
                        (fallback->match == NULL || is_printable_ascii(subject, size));
    const int code = native ? run(regex, subject, size)
                            : fallback->match(fallback->context, subject, size, err);
    if (!native && code < 0)
        return -1;
    if (native && code < 0 && code != PCRE2_ERROR_NOMATCH)
        return fail_match(regex, subject, size, code, err);
    *matched = code > 0;
    return 0;
}

const char *
tp_regex_pattern(const tp_regex *regex)
{
    return regex->pattern;
}

bool
tp_regex_is_native(const tp_regex *regex)
{
    return regex->code != NULL;
}

void
tp_regex_free(tp_regex *regex)
{
    if (regex == NULL)
        return;
    if (regex->fallback.match != NULL)
        regex->fallback.release(regex->fallback.context);
    pcre2_match_context_free(regex->limits);
    pcre2_code_free(regex->code);
    free(regex->literal);
    free(regex->pattern);
    free(regex);
}
