/* SPDX-License-Identifier: Apache-2.0 */
/* dtype.c -- the spellings of a data type. */
#include "base/dtype.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/did_you_mean.h"
#include "base/text.h"

static const char *const spellings[] = {
    "float16", "half", "fp16",    "bfloat16", "bf16", "float32",
    "float",   "fp32", "float64", "double",   "fp64",
};

static const char *const canonical[] = {
    "float16", "float16", "float16", "bfloat16", "bfloat16", "float32",
    "float32", "float32", "float64", "float64",  "float64",
};

#define SPELLINGS ((int)(sizeof(spellings) / sizeof(spellings[0])))
_Static_assert(sizeof(spellings) == sizeof(canonical), "one name per spelling");

static const char torch_prefix[] = "torch.";

static bool
is_blank(char letter)
{
    return letter == ' ' || (letter >= '\t' && letter <= '\r');
}

/* Whether the first `size` bytes of `text` are `word`, without regard to case. */
static bool
reads(const char *text, size_t size, const char *word)
{
    if (strlen(word) != size)
        return false;
    for (size_t i = 0; i < size; i++)
        if (tp_text_lower(text[i]) != word[i])
            return false;
    return true;
}

static int
fail_unknown(const char *spelling, const char *core, size_t size, const char *where,
             tp_error *err)
{
    tp_text bare = TP_NO_TEXT, text = TP_NO_TEXT;
    char *name = NULL;
    tp_text_add(&bare, "%.*s", (int)size, core);
    if (tp_text_take(&bare, &name, err) < 0)
        return -1;
    tp_text_add(&text, "%s: '%s' is not a dtype", where, spelling);
    tp_did_you_mean_add(&text, name, spellings, SPELLINGS);
    free(name);
    return tp_text_fail(&text, TP_VALUE, err);
}

int
tp_dtype_name(const char *spelling, const char *where, const char **out, tp_error *err)
{
    const char *core = spelling;
    while (is_blank(*core))
        core++;
    size_t size = strlen(core);
    while (size > 0 && is_blank(core[size - 1]))
        size--;

    const size_t prefix = sizeof(torch_prefix) - 1;
    if (size > prefix && reads(core, prefix, torch_prefix)) {
        core += prefix;
        size -= prefix;
    }
    for (int i = 0; i < SPELLINGS; i++) {
        if (reads(core, size, spellings[i])) {
            *out = canonical[i];
            return 0;
        }
    }
    return fail_unknown(spelling, core, size, where, err);
}
