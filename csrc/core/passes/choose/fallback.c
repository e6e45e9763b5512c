/* SPDX-License-Identifier: Apache-2.0 */
/* fallback.c -- modules with full activations, whatever the rules say. */
#include "passes/choose/fallback.h"

#include <stdlib.h>

#include "base/did_you_mean.h"
#include "model/names.h"
#include "passes/resolve/raw.h"
#include "rules/hf_tp_plan.h"

static const tp_spec skipped = {.partition = TP_PARTITION_SKIP, .dim = -1};
static const tp_spec full_output = {
    .partition = TP_PARTITION_COLUMN, .dim = -1, .gather_output = true};
static const tp_spec full_input = {
    .partition = TP_PARTITION_ROW, .dim = -1, .split_input = true};

/* Names of modules that an option gives. */
typedef struct {
    const char *option;
    const char *const *names;
    int count;
} named;

static int
unknown_module(const tp_build *build, const named *modules, int index, tp_error *err)
{
    const char *wanted = modules->names[index];
    tp_arena *arena = NULL;
    tp_names names;
    int result = tp_arena_new(&arena, err);
    if (result == 0)
        result = tp_names_of_model(arena, build->model, &names, err);
    if (result == 0) {
        int near[1];
        tp_text text = TP_NO_TEXT;
        tp_text_add(&text, "%s[%d]: no module is called '%s'", modules->option, index,
                    wanted);
        if (tp_did_you_mean(wanted, names.names, names.count, 1, near) > 0)
            tp_text_add(&text, "; did you mean '%s'?", names.names[near[0]]);
        result = tp_text_fail(&text, TP_VALUE, err);
    }
    tp_arena_free(arena);
    return result;
}

/* Parents come before their children, so one pass reaches everything below. */
static int
mark(const tp_build *build, const named *modules, bool *marked, bool *found,
     tp_error *err)
{
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        const tp_module *module = tp_model_module(build->model, i);
        marked[i] = module->parent >= 0 && marked[module->parent];
        for (int j = 0; j < modules->count; j++) {
            if (tp_hf_plan_match(modules->names[j], "", module->name, TP_STARS_INDICES))
                marked[i] = found[j] = true;
        }
    }
    for (int j = 0; j < modules->count; j++) {
        if (!found[j])
            return unknown_module(build, modules, j, err);
    }
    return 0;
}

static const tp_choice replicated = {&skipped, TP_FROM_NOTHING, "replicated",
                                     TP_REASON_FALLBACK_REPLICATED};

void
tp_fallback_replicate_tensor(tp_build *build, int parameter)
{
    const int first = tp_build_first(build, parameter);
    for (int i = first; i >= 0; i = build->next_name[i])
        build->choices[i] = replicated;
}

/* An embedding takes and gives what is full as it is. */
static void
shard_individually(tp_build *build, int parameter)
{
    const tp_parameter *at = tp_model_parameter(build->model, parameter);
    const tp_module *module = tp_model_module(build->model, at->module);
    tp_choice *choice = &build->choices[parameter];
    const tp_partition partition =
        choice->spec == NULL ? TP_PARTITION_SKIP : choice->spec->partition;
    /* A layer without a rule is replicated, or individually sharded. */
    if (module->kind == TP_MODULE_EMBEDDING ||
        (choice->spec == NULL && !tp_raw_is(build->model, parameter)))
        return;
    if (partition == TP_PARTITION_SKIP || tp_raw_is(build->model, parameter)) {
        *choice = replicated;
        return;
    }
    choice->spec = partition == TP_PARTITION_COLUMN ? &full_output : &full_input;
    choice->reason = TP_REASON_FALLBACK_INDIVIDUAL;
}

static int
choose(tp_build *build, const named *modules, void (*decide)(tp_build *, int),
       tp_error *err)
{
    if (modules->count == 0)
        return 0;
    const size_t count = (size_t)tp_model_module_count(build->model) + 1;
    bool *marked = calloc(count, sizeof(*marked));
    bool *found = calloc((size_t)modules->count, sizeof(*found));
    int result = -1;
    if (marked == NULL || found == NULL)
        tp_fail_memory(err);
    else
        result = mark(build, modules, marked, found, err);
    for (int i = 0; result == 0 && i < tp_model_parameter_count(build->model); i++) {
        if (marked[tp_model_parameter(build->model, i)->module])
            decide(build, i);
    }
    free(marked);
    free(found);
    return result;
}

int
tp_fallback_replicate(tp_build *build, tp_error *err)
{
    const tp_plan_options *options = build->options;
    const named modules = {"replicated", options->replicated,
                           options->replicated_count};
    return choose(build, &modules, tp_fallback_replicate_tensor, err);
}

int
tp_fallback_individual(tp_build *build, tp_error *err)
{
    const tp_plan_options *options = build->options;
    const named modules = {"individual", options->individual,
                           options->individual_count};
    return choose(build, &modules, shard_individually, err);
}
