/* SPDX-License-Identifier: Apache-2.0 */
/* input.h -- the bytes of a fuzzer, read as numbers and texts.
 *
 * Behind the end numbers are 0 and texts "", so that any bytes are an input. One
 * expression takes one value: in which order C evaluates several is up to the
 * compiler, and an input would mean something else to the next. Texts are
 * in memory of just their size, so that a sanitizer sees what is read beside them; all
 * are given back by input_end. */
#ifndef TP_FUZZ_INPUT_H
#define TP_FUZZ_INPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* What has to hold for every input. */
#define REQUIRE(condition)                                                   \
    do {                                                                     \
        if (!(condition)) {                                                  \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, \
                    #condition);                                             \
            abort();                                                         \
        }                                                                    \
    } while (0)

/* The function that a fuzzer calls. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { INPUT_TEXTS = 64 };

typedef struct {
    const uint8_t *at;
    size_t left;
    char *texts[INPUT_TEXTS]; /* owned */
    int text_count;
} input;

static inline input
input_of(const uint8_t *data, size_t size)
{
    return (input){.at = data, .left = size};
}

static inline void
input_end(input *in)
{
    for (int i = 0; i < in->text_count; i++)
        free(in->texts[i]);
    in->text_count = 0;
}

static inline int
take_byte(input *in)
{
    if (in->left == 0)
        return 0;
    in->left--;
    return *in->at++;
}

static inline bool
take_bool(input *in)
{
    return (take_byte(in) & 1) != 0;
}

/* Two bytes, the higher one first. */
static inline int
take_short(input *in)
{
    const int high = take_byte(in);
    return high << 8 | take_byte(in);
}

/* `low` to `high`, which are at most 255 apart. */
static inline int
take_int(input *in, int low, int high)
{
    return low + take_byte(in) % (high - low + 1);
}

static inline int64_t
take_int64(input *in)
{
    uint64_t value = 0;
    for (int i = 0; i < 8; i++)
        value = value << 8 | (uint64_t)take_byte(in);
    return (int64_t)value;
}

/* Mostly small, now and then where 64 bits end, now and then anything. */
static inline int64_t
take_size(input *in)
{
    static const int64_t edges[] = {-1,
                                    0,
                                    INT32_MAX,
                                    (int64_t)INT32_MAX + 1,
                                    INT64_MAX / 2,
                                    INT64_MAX - 1,
                                    INT64_MAX,
                                    INT64_MIN};
    const int kind = take_byte(in);
    if (kind < 224)
        return kind;
    if (kind < 240)
        return take_short(in);
    return kind < 252 ? edges[kind % COUNT(edges)] : take_int64(in);
}

static inline char *
keep_text(input *in, const uint8_t *from, size_t size)
{
    char *text = malloc(size + 1);
    if (text == NULL || in->text_count == INPUT_TEXTS)
        abort();
    if (size > 0)
        memcpy(text, from, size);
    text[size] = '\0';
    in->texts[in->text_count++] = text;
    return text;
}

/* Up to the end of the line, or a NUL. */
static inline const char *
take_line(input *in)
{
    size_t size = 0;
    while (size < in->left && in->at[size] != '\n' && in->at[size] != '\0')
        size++;
    const char *text = keep_text(in, in->at, size);
    const size_t used = size + (size < in->left);
    in->at += used;
    in->left -= used;
    return text;
}

/* All that is left, NULs included; `size` is without the one behind it. */
static inline const char *
take_rest(input *in, size_t *size)
{
    *size = in->left;
    in->left = 0;
    return keep_text(in, in->at, *size);
}

/* One of a table, or "" where the input says so. */
static inline const char *
take_name(input *in, const char *const *names, int count)
{
    const int index = take_byte(in);
    return index < count ? names[index] : "";
}

/* Whether the call did what it was asked to. Where it did not, it says why. */
static inline bool
is_done(int result, tp_error *err)
{
    if (result >= 0) {
        REQUIRE(err->code == TP_OK);
        return true;
    }
    REQUIRE(result == -1 && err->code != TP_OK && err->code != TP_BUG);
    REQUIRE(err->code == TP_MEMORY || tp_error_text(err)[0] != '\0');
    tp_error_clear(err);
    return false;
}

#endif
