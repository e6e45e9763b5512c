/* SPDX-License-Identifier: Apache-2.0 */
/* error.h -- what went wrong, in words meant for the user.
 *
 * Every function that can fail returns 0, or -1 with its `tp_error` filled.
 * The core never prints and never exits; the glue turns an error into an
 * exception. */
#ifndef TP_ERROR_H
#define TP_ERROR_H

typedef enum {
    TP_OK = 0,
    TP_VALUE,  /* the user's value is wrong: ValueError */
    TP_TYPE,   /* the user's type is wrong: TypeError */
    TP_LIMIT,  /* a bounded search ran out of its bound: ValueError */
    TP_MEMORY, /* MemoryError */
    TP_RAISED, /* a callback has already set its own exception */
    TP_PEER,   /* another rank is not there: RuntimeError */
    TP_BUG     /* an assertion of ours does not hold: RuntimeError */
} tp_code;

typedef struct {
    tp_code code;
    char *message; /* owned; NULL for TP_OK, TP_MEMORY and TP_RAISED */
} tp_error;

#define TP_NO_ERROR \
    {               \
        TP_OK, NULL \
    }

/* Fill `err` from a printf format, replacing what it held. Always returns -1,
 * so that a caller can write `return tp_fail(...)`. The code is TP_MEMORY where there
 * is no memory for the message. Names in it may be anybody's: control characters are
 * escaped, and of many kilobytes the middle is left out. */
int tp_fail(tp_error *err, tp_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The one way to report that memory ran out. Always returns -1. */
int tp_fail_memory(tp_error *err);

/* The message, never NULL; borrowed until the error changes. */
const char *tp_error_text(const tp_error *err);

/* Release the message and return to TP_OK. */
void tp_error_clear(tp_error *err);

#endif
