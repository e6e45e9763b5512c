/* SPDX-License-Identifier: Apache-2.0 */
/* head_counts.c -- head counts under names that geometry.c does not know. */
#include "model/head_counts.h"

#include <stddef.h>
#include <string.h>

/* Parts of the names of integers that count features, never heads. */
static const char *const size_words[] = {"dim",   "size",  "width",    "hidden",
                                         "embd",  "embed", "features", "channels",
                                         "model", "len",   NULL};

static bool
is_size(const char *key)
{
    for (int i = 0; size_words[i] != NULL; i++) {
        if (strstr(key, size_words[i]) != NULL)
            return true;
    }
    return strncmp(key, "d_", 2) == 0;
}

/* A number of the configuration may be of another part of the model. */
static bool
is_own(const tp_integer *integer)
{
    return strchr(integer->key, '.') == NULL;
}

static bool
has_another(const tp_module *module, int but, int64_t value)
{
    for (int i = 0; i < module->integer_count; i++) {
        if (i != but && is_own(&module->integers[i]) &&
            module->integers[i].value == value)
            return true;
    }
    return false;
}

/* How much speaks for integer `index` as the count of query heads; -1: it cannot be. */
static int
score(const tp_module *module, int index, int64_t query_width, int64_t key_width)
{
    const tp_integer *at = &module->integers[index];
    if (at->value < 1 || !is_own(at) || is_size(at->key) ||
        query_width % at->value != 0)
        return -1;
    const int64_t head_size = query_width / at->value;
    if (key_width % head_size != 0 || at->value % (key_width / head_size) != 0)
        return -1;
    const bool has_size = has_another(module, index, head_size);
    const bool has_keys =
        key_width != query_width && has_another(module, index, key_width / head_size);
    return (strstr(at->key, "head") != NULL) + has_size + has_keys;
}

bool
tp_head_counts_guess(const tp_module *module, int64_t query_width, int64_t key_width,
                     tp_heads *heads, int64_t *head_size)
{
    int64_t found = 0;
    int best = -1;
    if (query_width < 1 || key_width < 1)
        return false;
    for (int i = 0; i < module->integer_count; i++) {
        const int64_t value = module->integers[i].value;
        const int points = score(module, i, query_width, key_width);
        if (points > best) {
            best = points;
            found = value;
        } else if (points == best && value != found) {
            found = 0; /* one of two */
        }
    }
    if (best < 0 || found == 0)
        return false;
    *head_size = query_width / found;
    *heads = (tp_heads){found, key_width / *head_size};
    return true;
}

tp_head_count
tp_head_counts_meaning(const tp_integer *integer, tp_heads heads, int64_t head_size)
{
    const int64_t value = integer->value;
    if (!is_own(integer))
        return TP_COUNTS_NOTHING;
    if (is_size(integer->key))
        return value == heads.query * head_size ? TP_COUNTS_QUERY_WIDTH
               : value == heads.key * head_size ? TP_COUNTS_KEY_WIDTH
                                                : TP_COUNTS_NOTHING;
    return value == heads.query               ? TP_COUNTS_QUERY_HEADS
           : value == heads.key               ? TP_COUNTS_KEY_HEADS
           : value == heads.query / heads.key ? TP_COUNTS_GROUP
                                              : TP_COUNTS_NOTHING;
}
