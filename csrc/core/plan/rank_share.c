/* SPDX-License-Identifier: Apache-2.0 */
/* rank_share.c -- how much of a model a rank holds, and what it holds in vain. */
#include "plan/rank_share.h"

#include <stdlib.h>
#include <string.h>

#include "base/map.h"
#include "model/names.h"
#include "plan/plan_build.h"

/* A rank that holds more than this share of the parameters gains next to nothing. */
static const double most = 0.9;
enum { NAMED = 3 };

/* Replicated parameters whose names differ in indices only. */
typedef struct {
    char *pattern; /* owned */
    int64_t elements;
} group;

static int64_t
elements_of(const int64_t *shape, int dims)
{
    int64_t elements = 1;
    for (int i = 0; i < dims; i++)
        elements *= shape[i];
    return elements;
}

int64_t
tp_plan_parameters(const tp_plan *plan)
{
    return tp_model_elements(plan->model);
}

int64_t
tp_plan_rank_parameters(const tp_plan *plan, int rank)
{
    int64_t shape[TP_MAX_DIMS];
    int64_t total = 0;
    for (int i = 0; i < plan->entry_count; i++) {
        const tp_parameter *at = tp_model_parameter(plan->model, i);
        if (at->tied_to >= 0)
            continue;
        tp_plan_local_shape(plan, i, rank, shape);
        total += elements_of(shape, at->dims);
    }
    return total;
}

/* Count a parameter in its group. `groups` has room for one more. */
static int
add_to_group(group *groups, int *count, tp_map *map, const tp_parameter *at,
             tp_error *err)
{
    char *pattern = malloc(strlen(at->name) + 1);
    if (pattern == NULL)
        return tp_fail_memory(err);
    tp_names_pattern(at->name, pattern);
    const int held = tp_map_add(map, pattern, *count, err);
    if (held == *count)
        groups[(*count)++] = (group){pattern, 0};
    else
        free(pattern);
    if (held >= 0)
        groups[held].elements += tp_parameter_elements(at);
    return held < 0 ? -1 : 0;
}

/* Move the largest groups to the front, the first of equal ones first. */
static void
sort_largest(group *groups, int count)
{
    for (int i = 0; i < count && i < NAMED; i++) {
        int largest = i;
        for (int j = i + 1; j < count; j++)
            if (groups[j].elements > groups[largest].elements)
                largest = j;
        const group found = groups[largest];
        memmove(&groups[i + 1], &groups[i], (size_t)(largest - i) * sizeof(*groups));
        groups[i] = found;
    }
}

/* A pattern of names as a regular expression inside of JSON. */
static const char words[] =
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_";

static void
add_expression(tp_text *out, const char *pattern)
{
    for (const char *at = pattern; *at != '\0'; at++) {
        /* Bytes of other letters than ASCII's stand for themselves. */
        const bool is_word = (*at & 0x80) != 0 || tp_text_is_one_of(*at, words);
        if (*at == '*')
            tp_text_add(out, "[0-9]+");
        else
            tp_text_add(out, "%s%c", is_word ? "" : "\\\\", *at);
    }
    tp_text_add(out, "$");
}

static void
add_warning(tp_text *out, const group *groups, int count, int64_t held, int64_t total)
{
    tp_text_add(out,
                "a rank holds %.2f of the parameters, because few layers are sharded. "
                "The largest replicated parameters: ",
                (double)held / (double)total);
    for (int i = 0; i < count && i < NAMED; i++)
        tp_text_add(out, "%s%s (%.2f)", i == 0 ? "" : ", ", groups[i].pattern,
                    (double)groups[i].elements / (double)total);
    tp_text_add(out,
                ". To shard them, write rules in tensor_parallel.partition_config, "
                "which replaces the model's own plan, with layer_specs like "
                "{\"patterns\": [\"");
    add_expression(out, groups[0].pattern);
    tp_text_add(out,
                "\"], \"partition_type\": \"column\"}: \"column\" for the layers that "
                "produce features, \"row\" for the layer that consumes them");
}

static int
warn(const tp_plan *plan, int64_t held, int64_t total, tp_text *out, tp_error *err)
{
    tp_map *map = NULL;
    int count = 0, result = -1;
    group *groups = calloc((size_t)plan->entry_count + 1, sizeof(*groups));
    if (groups == NULL)
        tp_fail_memory(err);
    else
        result = tp_map_new(64, &map, err);
    for (int i = 0; result == 0 && i < plan->entry_count; i++) {
        const tp_parameter *at = tp_model_parameter(plan->model, i);
        if (at->tied_to < 0 && plan->entries[i].layout == NULL)
            result = add_to_group(groups, &count, map, at, err);
    }
    if (result == 0 && count > 0) {
        sort_largest(groups, count);
        add_warning(out, groups, count, held, total);
        result = out->failed ? tp_fail_memory(err) : 0;
    }
    tp_map_free(map);
    for (int i = 0; i < count; i++)
        free(groups[i].pattern);
    free(groups);
    return result;
}

int
tp_plan_warn_replicated(const tp_plan *plan, tp_text *out, tp_error *err)
{
    const int64_t total = tp_plan_parameters(plan);
    int64_t held = 0;
    for (int rank = 0; rank < plan->ranks; rank++) {
        const int64_t own = tp_plan_rank_parameters(plan, rank);
        held = own > held ? own : held;
    }
    if (plan->ranks == 1 || (double)held <= most * (double)total)
        return 0;
    return warn(plan, held, total, out, err);
}
