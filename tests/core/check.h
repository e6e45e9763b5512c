/* SPDX-License-Identifier: Apache-2.0 */
/* check.h -- the checks of the C unit tests.
 *
 * A check that fails prints test, file, line and values, is counted, and lets
 * the test go on; it is an expression that says whether it held, so that a
 * test can stop where going on makes no sense. Each test program ends with
 * `return check_result();`. */
#ifndef TP_CHECK_H
#define TP_CHECK_H

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"

#ifdef TP_FAIL_ALLOCATIONS
#include "failing_allocations.h"
#else
#define FAILING_EACH(call, err) (call)
#endif

/* One test program is one translation unit, so these are its own. */
static int check_failures;
static int check_count;
static const char *check_test = "(no test)";

static inline bool
check_note(bool held, const char *file, int line)
{
    check_count++;
    if (held)
        return true;
    check_failures++;
    fprintf(stderr, "%s:%d: %s: ", file, line, check_test);
    return false;
}

static inline bool
check_that(bool held, const char *what, const char *file, int line)
{
    if (check_note(held, file, line))
        return true;
    fprintf(stderr, "%s does not hold\n", what);
    return false;
}

static inline bool
check_int(long long got, long long want, const char *what, const char *file, int line)
{
    if (check_note(got == want, file, line))
        return true;
    fprintf(stderr, "%s is %lld, not %lld\n", what, got, want);
    return false;
}

static inline bool
check_text(const char *got, const char *want, const char *what, const char *file,
           int line)
{
    const bool same =
        got == want || (got != NULL && want != NULL && strcmp(got, want) == 0);
    if (check_note(same, file, line))
        return true;
    fprintf(stderr, "%s is\n  %s\nnot\n  %s\n", what, got == NULL ? "NULL" : got,
            want == NULL ? "NULL" : want);
    return false;
}

static inline bool
check_has(const char *text, const char *part, const char *what, const char *file,
          int line)
{
    if (check_note(text != NULL && strstr(text, part) != NULL, file, line))
        return true;
    fprintf(stderr, "%s is\n  %s\nwithout\n  %s\n", what, text == NULL ? "NULL" : text,
            part);
    return false;
}

static inline bool
check_ok(int result, tp_error *err, const char *what, const char *file, int line)
{
    const bool held = check_note(result == 0, file, line);
    if (!held)
        fprintf(stderr, "%s returned %d: %s\n", what, result, tp_error_text(err));
    tp_error_clear(err);
    return held;
}

static inline bool
check_fails(int result, tp_code code, tp_error *err, const char *part, const char *what,
            const char *file, int line)
{
    const char *message = tp_error_text(err);
    const bool held =
        result == -1 && err->code == code && strstr(message, part) != NULL;
    if (!check_note(held, file, line))
        fprintf(stderr,
                "%s returned %d, code %d, message\n  %s\nnot -1, code %d, with\n  %s\n",
                what, result, (int)err->code, message, (int)code, part);
    tp_error_clear(err);
    return held;
}

static inline void
check_run(const char *name, void (*test)(void))
{
    check_test = name;
    test();
}

static inline int
check_result(void)
{
    printf("%s: %d checks, %d failed\n", __BASE_FILE__, check_count, check_failures);
#ifdef TP_FAIL_ALLOCATIONS
    printf("%s: %ld allocations failed, %ld of them in silence\n", __BASE_FILE__,
           failing_calls, failing_silent);
    check_failures += failing_silent > 0;
#endif
    return check_failures != 0 || check_count == 0;
}

/* Run `void test(void)`; its name is a sentence and appears in failures. */
#define RUN(test) check_run(#test, test)

#define CHECK(condition) check_that((condition), #condition, __FILE__, __LINE__)

/* Any integers that fit long long. */
#define CHECK_INT_EQ(got, want) \
    check_int((long long)(got), (long long)(want), #got, __FILE__, __LINE__)

/* Strings; NULL equals NULL only. */
#define CHECK_TEXT_EQ(got, want) check_text((got), (want), #got, __FILE__, __LINE__)

/* `part` occurs in `text`. */
#define CHECK_TEXT_HAS(text, part) check_has((text), (part), #text, __FILE__, __LINE__)

/* `call` returns 0. `err` is a pointer; it is cleared afterwards. */
#define CHECK_OK(call, err) \
    check_ok(FAILING_EACH(call, err), (err), #call, __FILE__, __LINE__)

/* `call` returns -1 with `code` and with `part` in the message. `err` is a
 * pointer; it is cleared afterwards. */
#define CHECK_FAILS(call, code, err, part)                                       \
    check_fails(FAILING_EACH(call, err), (code), (err), (part), #call, __FILE__, \
                __LINE__)

#endif
