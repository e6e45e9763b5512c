/* SPDX-License-Identifier: Apache-2.0 */
/* family_blocks.c -- layers that are sharded in pairs because their names and sizes say
 * so.
 */
#include "passes/choose/family_blocks.h"

#include <stdlib.h>
#include <string.h>

#include "base/map.h"
#include "model/adapters.h"
#include "model/names.h"
#include "passes/choose/family_fit.h"
#include "passes/resolve/resolve.h"
#include "rules/families.h"

typedef struct {
    tp_build *build;
    const char **plain; /* one per module: its name without adapters; NULL for what
                         * these add */
    tp_map *names;      /* of linear layers, without adapters */
    tp_text room;
    tp_source source;
    tp_map *warned; /* starred names of outputs that a message was made of */
} search;

static bool
is_linear(const tp_module *module)
{
    return module->kind == TP_MODULE_LINEAR || module->kind == TP_MODULE_CONV1D;
}

/* Whether a layer may be sharded: a linear layer that no rule speaks of, not inside of
 * something whose output is summed. A tensor may be part of several blocks. */
static bool
is_free(const search *with, int module)
{
    const tp_build *build = with->build;
    const tp_module *at = tp_model_module(build->model, module);
    const int weight = tp_family_weight(build, module);
    if (!is_linear(at) || with->plain[module] == NULL || weight < 0)
        return false;
    for (int i = tp_build_first(build, weight); i >= 0; i = build->next_name[i]) {
        if (build->choices[i].spec != NULL &&
            (i == weight || build->choices[i].source != with->source))
            return false;
    }
    return !tp_build_in_experts(build, module);
}

/* The module `name` beside the output, whose own name ends in `tail` bytes. -1: none.
 */
static int
find_beside(search *with, const char *output, size_t tail, const char *name)
{
    with->room.size = 0;
    tp_text_add(&with->room, "%.*s%s", (int)(strlen(output) - tail), output, name);
    if (with->room.failed)
        return -1;
    return tp_map_find(with->names, with->room.data, with->room.size);
}

static bool
find_inputs(search *with, const tp_family_block *row, int output, tp_family_found *out)
{
    const char *name = with->plain[output];
    const size_t size = strlen(name), tail = strlen(row->output);
    if (size < tail || strcmp(name + size - tail, row->output) != 0 ||
        (size > tail && name[size - tail - 1] != '.'))
        return false;
    *out = (tp_family_found){.row = row, .output = output, .attention = -1};
    while (out->count < TP_FAMILY_INPUTS && row->inputs[out->count] != NULL) {
        const int input = find_beside(with, name, tail, row->inputs[out->count]);
        if (input < 0 || !is_free(with, input))
            return false;
        out->inputs[out->count++] = input;
    }
    return true;
}

static int
choose_layer(search *with, const tp_family_found *at, int module, bool input,
             tp_error *err)
{
    tp_build *build = with->build;
    tp_spec *spec = tp_arena_take(build->plan->arena, 1, sizeof(*spec), err);
    if (spec == NULL)
        return -1;
    *spec = (tp_spec)TP_NO_SPEC;
    spec->partition = input ? TP_PARTITION_COLUMN : TP_PARTITION_ROW;
    const int pieces = tp_family_pieces(build, at, input);
    if (pieces > 1) {
        const bool linear =
            tp_model_module(build->model, module)->kind == TP_MODULE_LINEAR;
        spec->shape = (tp_shape){.dims = 2, .sizes = {-1, -1}};
        spec->shape.sizes[linear == input ? 0 : 1] = pieces;
    }
    build->attentions[module] = at->attention;
    build->choices[tp_family_weight(build, module)] =
        (tp_choice){spec, with->source, at->row->output, TP_REASON_FAMILY};
    return tp_resolve_parameter(build, tp_family_weight(build, module), err);
}

static void
leave(tp_build *build, int module)
{
    const int weight = tp_family_weight(build, module);
    build->choices[weight] = (tp_choice)TP_NO_CHOICE;
    build->decisions[weight] = (tp_decision)TP_NO_DECISION;
    build->attentions[module] = TP_ATTENTION_NEAR;
}

/* One message for all blocks that differ in indices only. */
static int
warn_once(search *with, const tp_family_found *at, const char *why, tp_error *err)
{
    tp_build *build = with->build;
    const char *name = tp_model_module(build->model, at->output)->name;
    char *starred = tp_names_starred(build->plan->arena, name, err);
    if (starred == NULL)
        return -1;
    if (tp_map_find(with->warned, starred, strlen(starred)) >= 0)
        return 0;
    if (tp_map_add(with->warned, starred, 0, err) < 0)
        return -1;
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "the block of '%s' is not sharded as one: %s", starred, why);
    return tp_build_message(build, &text, err);
}

/* All layers of the block, or none. */
static int
choose_block(search *with, const tp_family_found *at, tp_error *err)
{
    tp_build *build = with->build;
    int result = choose_layer(with, at, at->output, false, err);
    for (int i = 0; result == 0 && i < at->count; i++)
        result = choose_layer(with, at, at->inputs[i], true, err);
    if (result == 0) {
        build->paired++;
        return 0;
    }
    leave(build, at->output);
    for (int i = 0; i < at->count; i++)
        leave(build, at->inputs[i]);
    if (err->code != TP_VALUE)
        return -1;
    result = warn_once(with, at, tp_error_text(err), err);
    if (result == 0)
        tp_error_clear(err);
    return result;
}

/* The first row whose layers are all there decides. */
static int
try_output(search *with, int module, tp_error *err)
{
    const char *type = tp_model_get_facts(with->build->model)->model_type;
    for (int i = 0; i < tp_family_block_count; i++) {
        const tp_family_block *row = &tp_family_blocks[i];
        tp_family_found at;
        if (row->model_type != NULL &&
            (type == NULL || !tp_text_same(row->model_type, type)))
            continue;
        if (!find_inputs(with, row, module, &at))
            continue;
        const char *problem = tp_family_misfit(with->build, &at);
        if (problem == NULL)
            return choose_block(with, &at, err);
        return warn_once(with, &at, problem, err);
    }
    return 0;
}

/* The name of a module without adapters, in the arena; NULL for a factor, or a copy
 * that is trained in full. */
static int
plain_name(const search *with, int module, const char **out, tp_error *err)
{
    char room[TP_LONGEST_NAME];
    tp_adapted part;
    const char *name = tp_model_module(with->build->model, module)->name;
    const char *plain = tp_adapters_plain(name, room, &part);
    *out = NULL;
    if (part == TP_ADAPTED_DOWN || part == TP_ADAPTED_UP || tp_adapters_is_copy(name))
        return 0;
    *out = plain == name
               ? name
               : tp_arena_text(with->build->plan->arena, plain, strlen(plain), err);
    return *out == NULL ? -1 : 0;
}

static int
map_names(search *with, tp_error *err)
{
    const tp_model *model = with->build->model;
    const int count = tp_model_module_count(model);
    with->plain = calloc((size_t)count + 1, sizeof(*with->plain));
    if (with->plain == NULL)
        return tp_fail_memory(err);
    if (tp_map_new((size_t)count, &with->names, err) < 0 ||
        tp_map_new(16, &with->warned, err) < 0)
        return -1;
    for (int i = 0; i < count; i++) {
        if (!is_linear(tp_model_module(model, i)))
            continue;
        if (plain_name(with, i, &with->plain[i], err) < 0 ||
            (with->plain[i] != NULL &&
             tp_map_add(with->names, with->plain[i], i, err) < 0))
            return -1;
    }
    return 0;
}

bool
tp_family_may_choose(const tp_build *build)
{
    const tp_plan_options *options = build->options;
    const char *type = tp_model_get_facts(build->model)->model_type;
    return options->families && !tp_rules_have(build->rules, TP_FROM_CONFIG) &&
           !tp_rules_have(build->rules, TP_FROM_PRESET) &&
           (tp_family_is_tried(type) || options->heuristics);
}

int
tp_family_blocks_choose(tp_build *build, tp_error *err)
{
    const char *type = tp_model_get_facts(build->model)->model_type;
    if (!tp_family_may_choose(build))
        return 0;
    search with = {
        .build = build,
        .room = TP_NO_TEXT,
        .source = tp_family_is_tried(type) ? TP_FROM_FAMILY : TP_FROM_HEURISTIC};
    int result = map_names(&with, err);
    for (int i = 0; result == 0 && i < tp_model_module_count(build->model); i++) {
        if (is_free(&with, i))
            result = try_output(&with, i, err);
    }
    if (result == 0 && with.room.failed)
        result = tp_fail_memory(err);
    free(with.plain);
    tp_map_free(with.names);
    tp_map_free(with.warned);
    tp_text_free(&with.room);
    return result;
}
