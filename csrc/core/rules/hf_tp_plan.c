/* SPDX-License-Identifier: Apache-2.0 */
/* hf_tp_plan.c -- the tensor-parallel plans of transformers. */
#include "rules/hf_tp_plan.h"

#include <string.h>

#include "base/did_you_mean.h"
#include "model/names.h"

typedef struct {
    const char *name;
    tp_style style;
    tp_spec spec; /* of TP_STYLE_SHARD */
} style_row;

#define PACKED(...)                     \
    {                                   \
        .dims = 2, .sizes = __VA_ARGS__ \
    }

/* Names of today and of earlier releases, from
 * https://github.com/huggingface/transformers/tree/main/src/transformers. A packed
 * style means gate|up: two equal pieces along the sharded dimension. */
static const style_row styles[] = {
    {"colwise", TP_STYLE_SHARD, {.partition = TP_PARTITION_COLUMN, .dim = -1}},
    {"colwise_gather_output",
     TP_STYLE_SHARD,
     {.partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true}},
    {"colwise_rep",
     TP_STYLE_SHARD,
     {.partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true}},
    {"rowwise", TP_STYLE_SHARD, {.partition = TP_PARTITION_ROW, .dim = -1}},
    {"rowwise_split_input",
     TP_STYLE_SHARD,
     {.partition = TP_PARTITION_ROW, .dim = -1, .split_input = true}},
    {"rowwise_rep",
     TP_STYLE_SHARD,
     {.partition = TP_PARTITION_ROW, .dim = -1, .split_input = true}},
    {"embedding_rowwise", TP_STYLE_SHARD, {.partition = TP_PARTITION_ROW, .dim = -1}},
    {"embedding_colwise",
     TP_STYLE_SHARD,
     {.partition = TP_PARTITION_COLUMN, .dim = -1}},
    {"packed_colwise",
     TP_STYLE_SHARD,
     {.partition = TP_PARTITION_COLUMN, .dim = -1, .shape = PACKED({2, -1})}},
    {"packed_rowwise",
     TP_STYLE_SHARD,
     {.partition = TP_PARTITION_ROW, .dim = -1, .shape = PACKED({-1, 2})}},
    {"replicated_with_grad_allreduce",
     TP_STYLE_SHARD,
     {.partition = TP_PARTITION_SKIP, .dim = -1, .sum_gradient = true}},
    {"replicate", TP_STYLE_SHARD, {.partition = TP_PARTITION_SKIP, .dim = -1}},
    {.name = "moe_tp_experts", .style = TP_STYLE_EXPERTS},
    {.name = "moe_identity_expert", .style = TP_STYLE_SHARE},
    {.name = "mla_kv_a_proj", .style = TP_STYLE_ROPE},
    {.name = "local_params", .style = TP_STYLE_NOTHING},
    {.name = "all_reduce", .style = TP_STYLE_EXPERTS},
    {.name = "sequence_parallel", .style = TP_STYLE_UNKNOWN},
    {.name = "gather", .style = TP_STYLE_UNKNOWN},
    {.name = "local", .style = TP_STYLE_NOTHING},
    {.name = "local_colwise", .style = TP_STYLE_UNKNOWN},
    {.name = "local_rowwise", .style = TP_STYLE_UNKNOWN},
    {.name = "grouped_gemm", .style = TP_STYLE_UNKNOWN},
    {.name = "ep_router", .style = TP_STYLE_UNKNOWN},
};

enum { STYLE_COUNT = sizeof(styles) / sizeof(styles[0]) };

const char *
tp_hf_plan_style_name(int index)
{
    return index >= 0 && index < STYLE_COUNT ? styles[index].name : NULL;
}

static int
unknown_style(const char *style, const char *pattern, tp_error *err)
{
    const char *names[STYLE_COUNT];
    for (int i = 0; i < STYLE_COUNT; i++)
        names[i] = styles[i].name;

    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "tp_plan['%s']: unknown style '%s'", pattern, style);
    tp_did_you_mean_add(&text, style, names, STYLE_COUNT);
    return tp_text_fail(&text, TP_VALUE, err);
}

int
tp_hf_plan_style(const char *style, const char *pattern, tp_style *out, tp_spec *spec,
                 tp_error *err)
{
    for (int i = 0; i < STYLE_COUNT; i++) {
        if (!tp_text_same(style, styles[i].name))
            continue;
        *out = styles[i].style;
        *spec = styles[i].spec;
        return 0;
    }
    return unknown_style(style, pattern, err);
}

int
tp_hf_plan_spec(const char *style, const char *pattern, tp_spec *out, tp_error *err)
{
    tp_style found;
    if (tp_hf_plan_style(style, pattern, &found, out, err) < 0)
        return -1;
    if (found == TP_STYLE_SHARD)
        return 0;
    return tp_fail(err, TP_VALUE,
                   "tp_plan['%s']: '%s' is a transformers style that shards no weight",
                   pattern, style);
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
            if (!tp_names_is_index(name))
                return false;
            name += strcspn(name, ".");
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

/* Compares with `*` for any text, dots included. */
static bool
same_text(const char *pattern, const char *name)
{
    const char *star = NULL; /* the last one, which takes the names from `taken` on */
    const char *taken = NULL;
    while (*name != '\0') {
        if (*pattern == '*') {
            star = pattern++;
            taken = name;
        } else if (*pattern == *name) {
            pattern++;
            name++;
        } else if (star != NULL) {
            pattern = star + 1;
            name = ++taken;
        } else {
            return false;
        }
    }
    return pattern[strspn(pattern, "*")] == '\0';
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
tp_hf_plan_match(const char *pattern, const char *prefix, const char *name,
                 tp_stars stars)
{
    bool (*same)(const char *, const char *) =
        stars == TP_STARS_INDICES ? same_name : same_text;
    if (same(pattern, name))
        return true;
    if (prefix[0] == '\0')
        return false;

    const char *rest = after_prefix(name, prefix);
    if (rest != NULL && same(pattern, rest))
        return true;
    rest = after_prefix(pattern, prefix);
    return rest != NULL && same(rest, name);
}
