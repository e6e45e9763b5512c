/* SPDX-License-Identifier: Apache-2.0 */
/* nothing_sharded.c -- a plan under which every rank would hold the full model. */
#include "passes/output/nothing_sharded.h"

#include "rules/preset.h"

enum { MESSAGES = 3 };

static const char sample[] =
    "{\"layer_specs\": [{\"patterns\": [\".*\\\\.up\\\\.weight$\"], "
    "\"partition_type\": \"column\"}, {\"patterns\": [\".*\\\\.down\\\\.weight$\"], "
    "\"partition_type\": \"row\"}]}";

static bool
shards_something(const tp_build *build)
{
    const tp_plan *plan = build->plan;
    for (int i = 0; i < plan->entry_count; i++) {
        const tp_entry *entry = &plan->entries[i];
        if (entry->layout != NULL &&
            (build->options->families || entry->source != TP_FROM_DEFAULT))
            return true;
    }
    return false;
}

static void
add_presets(tp_text *text)
{
    int count = 0;
    const char *const *names = tp_preset_names(&count);
    for (int i = 0; i < count; i++)
        tp_text_add(text, "%s%s", i == 0 ? "" : ", ", names[i]);
}

/* Why names and sizes shard nothing either. */
static const char *
reason(const tp_plan_options *options)
{
    if (!options->heuristics)
        return "without a self-check its layers are not sharded by their names alone "
               "(load the weights on every rank and pass example_inputs, keyword "
               "arguments of its forward, to initialize or parallelize)";
    if (!options->large_layers)
        return "its layers have no names by which they could be sharded, and without "
               "a self-check large ones are not sharded individually";
    return "none of its layers is large enough to be sharded";
}

static void
add_no_plan(const tp_build *build, const char *model, tp_text *text)
{
    tp_text_add(
        text,
        "%s has no tensor-parallel plan of its own, the configuration gives none, and "
        "%s. Set tensor_parallel.preset_model to a preset that fits (",
        model, reason(build->options));
    add_presets(text);
    tp_text_add(text,
                "), or list the layers to shard in tensor_parallel.partition_config, "
                "as %s",
                sample);
}

int
tp_nothing_sharded_refuse(tp_build *build, tp_error *err)
{
    if (!build->options->must_shard || shards_something(build))
        return 0;
    const char *model = tp_model_module(build->model, 0)->class_name;
    const tp_plan *plan = build->plan;
    tp_text text = TP_NO_TEXT;
    if (build->options->families && tp_rules_count(build->rules) == 0)
        add_no_plan(build, model, &text);
    else
        tp_text_add(&text,
                    "the rules shard nothing of %s, so that every rank would hold all "
                    "of it: write rules for its parameters in "
                    "tensor_parallel.partition_config",
                    model);
    for (int i = 0; i < plan->message_count && i < MESSAGES; i++)
        tp_text_add(&text, "\n  - %s", plan->messages[i].text);
    return tp_text_fail(&text, TP_VALUE, err);
}
