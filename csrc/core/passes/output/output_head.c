/* SPDX-License-Identifier: Apache-2.0 */
/* output_head.c -- the layer that keeps its shard of the logits. */
#include "passes/output/output_head.h"

static const char *
name_of(const tp_build *build, int module)
{
    return tp_model_module(build->model, module)->name;
}

/* The layer of the plan that is the output head, or -1. */
static int
find_layer(const tp_plan *plan, int head)
{
    for (int i = 0; i < plan->layer_count; i++)
        if (plan->layers[i].module == head)
            return plan->layers[i].kind == TP_COLUMN && plan->layers[i].gather_output
                       ? i
                       : -1;
    return -1;
}

static bool
is_one_run_each(const tp_layout *layout)
{
    for (int rank = 0; rank < layout->ranks; rank++)
        if (layout->shards[rank].count != 1)
            return false;
    return true;
}

/* The layer, or -1 with the reason in `why`. */
static int
find(const tp_build *build, tp_text *why)
{
    const tp_model_facts *facts = tp_model_get_facts(build->model);
    const char *model = tp_model_module(build->model, 0)->class_name;
    const int head = facts->output_head;
    if (head < 0) {
        tp_text_add(why, "%s.get_output_embeddings() names no output head", model);
        return -1;
    }
    if (!facts->takes_labels) {
        tp_text_add(why, "%s.forward takes no labels", model);
        return -1;
    }
    const tp_module *at = tp_model_module(build->model, head);
    if (at->kind != TP_MODULE_LINEAR) {
        tp_text_add(why, "%s is a %s, not an nn.Linear",
                    at->name[0] == '\0' ? "the model itself" : at->name,
                    at->class_name);
        return -1;
    }
    const int layer = find_layer(build->plan, head);
    if (layer < 0) {
        tp_text_add(why,
                    "the plan does not shard %s along the vocabulary and gather its "
                    "output",
                    name_of(build, head));
        return -1;
    }
    const tp_layer *found = &build->plan->layers[layer];
    if (!is_one_run_each(build->plan->entries[found->weight].layout)) {
        tp_text_add(why, "a rank's shard of %s is not one run of the vocabulary",
                    name_of(build, head));
        return -1;
    }
    return layer;
}

int
tp_output_head_find(tp_build *build, tp_error *err)
{
    const int wanted = build->options->vocab_parallel_lm_head;
    tp_text why = TP_NO_TEXT;
    build->plan->logits_layer = wanted == 0 ? -1 : find(build, &why);
    int result = why.failed ? tp_fail_memory(err) : 0;
    if (result == 0 && wanted > 0 && why.size > 0)
        result = tp_fail(err, TP_VALUE,
                         "tensor_parallel.vocab_parallel_lm_head: got true, but %s; "
                         "leave the key out",
                         why.data);
    tp_text_free(&why);
    return result;
}
