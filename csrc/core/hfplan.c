/* SPDX-License-Identifier: Apache-2.0 */
/* hfplan.c -- the tensor-parallel plans of transformers. */
#include "hfplan.h"

#include <string.h>

#include "near.h"

/* A style without a specification is known to transformers and not built yet. */
typedef struct {
    const char *name;
    bool built;
    tp_spec spec;
} style_row;

#define PACKED(...)                     \
    {                                   \
        .dims = 2, .sizes = __VA_ARGS__ \
    }

/* Names of today and of earlier releases, from
 * https://github.com/huggingface/transformers/tree/main/src/transformers. A packed
 * style means gate|up: two equal pieces along the cut dimension. */
static const style_row styles[] = {
    {"colwise", true, {.cut = TP_CUT_COLUMN, .dim = -1}},
    {"colwise_gather_output",
     true,
     {.cut = TP_CUT_COLUMN, .dim = -1, .gather_output = true}},
    {"colwise_rep", true, {.cut = TP_CUT_COLUMN, .dim = -1, .gather_output = true}},
    {"rowwise", true, {.cut = TP_CUT_ROW, .dim = -1}},
    {"rowwise_split_input", true, {.cut = TP_CUT_ROW, .dim = -1, .split_input = true}},
    {"rowwise_rep", true, {.cut = TP_CUT_ROW, .dim = -1, .split_input = true}},
    {"embedding_rowwise", true, {.cut = TP_CUT_ROW, .dim = -1}},
    {"embedding_colwise", true, {.cut = TP_CUT_COLUMN, .dim = -1}},
    {"packed_colwise",
     true,
     {.cut = TP_CUT_COLUMN, .dim = -1, .shape = PACKED({2, -1})}},
    {"packed_rowwise", true, {.cut = TP_CUT_ROW, .dim = -1, .shape = PACKED({-1, 2})}},
    {"replicated_with_grad_allreduce",
     true,
     {.cut = TP_CUT_SKIP, .dim = -1, .sum_gradient = true}},
    {"replicate", true, {.cut = TP_CUT_SKIP, .dim = -1}},
    {.name = "moe_tp_experts"},
    {.name = "moe_identity_expert"},
    {.name = "mla_kv_a_proj"},
    {.name = "local_params"},
    {.name = "all_reduce"},
    {.name = "sequence_parallel"},
    {.name = "gather"},
    {.name = "local"},
    {.name = "local_colwise"},
    {.name = "local_rowwise"},
    {.name = "grouped_gemm"},
    {.name = "ep_router"},
};

enum { STYLE_COUNT = sizeof(styles) / sizeof(styles[0]) };

static int
unknown_style(const char *style, const char *pattern, tp_error *err)
{
    const char *names[STYLE_COUNT];
    for (int i = 0; i < STYLE_COUNT; i++)
        names[i] = styles[i].name;

    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "tp_plan['%s']: unknown style '%s'", pattern, style);
    tp_near_add(&text, style, names, STYLE_COUNT);
    return tp_text_fail(&text, TP_VALUE, err);
}

int
tp_hfplan_spec(const char *style, const char *pattern, tp_spec *out, tp_error *err)
{
    for (int i = 0; i < STYLE_COUNT; i++) {
        if (!tp_text_same(style, styles[i].name))
            continue;
        if (!styles[i].built)
            return tp_fail(
                err, TP_VALUE,
                "tp_plan['%s']: '%s' is a known transformers style that is not "
                "supported yet; write a partition_config for these layers",
                pattern, styles[i].name);
        *out = styles[i].spec;
        return 0;
    }
    return unknown_style(style, pattern, err);
}

/* Not isdigit(), which depends on the locale. */
static bool
is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static bool
ends_part(char c)
{
    return c == '.' || c == '\0';
}

/* Compares part by part; a part that is `*` takes a part of digits. */
static bool
same_name(const char *pattern, const char *name)
{
    bool at_start = true; /* of a part */
    while (*pattern != '\0') {
        if (at_start && *pattern == '*' && ends_part(pattern[1])) {
            if (!is_digit(*name))
                return false;
            while (is_digit(*name))
                name++;
            if (!ends_part(*name))
                return false;
            pattern++;
            at_start = false;
            continue;
        }
        if (*pattern != *name)
            return false;
        at_start = *pattern == '.';
        pattern++;
        name++;
    }
    return *name == '\0';
}

/* What follows `prefix.` in `name`, or NULL. */
static const char *
after_prefix(const char *name, const char *prefix)
{
    const size_t size = strlen(prefix);
    if (strncmp(name, prefix, size) != 0 || name[size] != '.')
        return NULL;
    return name + size + 1;
}

bool
tp_hfplan_match(const char *pattern, const char *prefix, const char *name)
{
    if (same_name(pattern, name))
        return true;
    if (prefix[0] == '\0')
        return false;

    const char *rest = after_prefix(name, prefix);
    if (rest != NULL && same_name(pattern, rest))
        return true;
    rest = after_prefix(pattern, prefix);
    return rest != NULL && same_name(rest, name);
}
