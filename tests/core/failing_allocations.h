/* SPDX-License-Identifier: Apache-2.0 */
/* failing_allocations.h -- a call, once for each of its allocations, which fails.
 *
 * FAILING_EACH(call, err) runs `call` with its first allocation and all after it
 * failing, then with its first alone, then likewise with its second, and so on until
 * none is left to fail: the result of that run is its value. Each failed run has to
 * return -1 with an error, and to leave things so that the same call can be made again.
 * What it leaks is found by LeakSanitizer. The program is linked with --wrap for the
 * three functions. */
#ifndef TP_FAILING_ALLOCATIONS_H
#define TP_FAILING_ALLOCATIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "base/error.h"

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *old, size_t size);

/* Allocations until one fails; 0: none does. */
static long failing_left;
static bool failing_on; /* and all after it */
static long failing_failed;
static long failing_calls, failing_silent;

static bool
failing_now(void)
{
    if (failing_left == 0)
        return false;
    if (failing_left > 1) {
        failing_left--;
        return false;
    }
    failing_left = failing_on ? 1 : 0;
    failing_failed++;
    return true;
}

void *
__wrap_malloc(size_t size)
{
    return failing_now() ? NULL : __real_malloc(size);
}

void *
__wrap_calloc(size_t count, size_t size)
{
    return failing_now() ? NULL : __real_calloc(count, size);
}

void *
__wrap_realloc(void *old, size_t size)
{
    return failing_now() ? NULL : __real_realloc(old, size);
}

typedef struct {
    long nth;
    bool on;
} failing;

static inline void
failing_begin(const failing *run)
{
    failing_left = run->nth;
    failing_on = run->on;
    failing_failed = 0;
}

/* Whether the call is to be made again. */
static inline bool
failing_again(failing *run, int result, tp_error *err, const char *what,
              const char *file, int line)
{
    failing_left = 0;
    if (failing_failed == 0)
        return false;
    failing_calls++;
    if (result != -1 || err->code == TP_OK) {
        failing_silent++;
        fprintf(stderr, "%s:%d: %s: returned %d, code %d, without its allocation %ld\n",
                file, line, what, result, (int)err->code, run->nth);
        return false;
    }
    tp_error_clear(err);
    run->nth += !run->on;
    run->on = !run->on;
    return true;
}

#define FAILING_EACH(call, err)                                                      \
    __extension__({                                                                  \
        failing failing_run = {1, true};                                             \
        int failing_result;                                                          \
        do {                                                                         \
            failing_begin(&failing_run);                                             \
            failing_result = (call);                                                 \
        } while (failing_again(&failing_run, failing_result, (err), #call, __FILE__, \
                               __LINE__));                                           \
        failing_result;                                                              \
    })

#endif
