/* SPDX-License-Identifier: Apache-2.0 */
/* rope.c -- the projection of latent attention that also makes positions. */
#include "passes/output/rope.h"

static const char *const size_keys[] = {"qk_rope_head_dim", NULL};

static int64_t
find_size(const tp_build *build, int module)
{
    const int parent = tp_model_module(build->model, module)->parent;
    const tp_module *attention = tp_model_module(build->model, parent);
    const int64_t own =
        tp_model_integer(attention->integers, attention->integer_count, size_keys);
    const tp_model_facts *facts = tp_model_get_facts(build->model);
    return own > 0 ? own
                   : tp_model_integer(facts->integers, facts->integer_count, size_keys);
}

int
tp_rope_layer(const tp_build *build, int module, tp_layer *out, tp_error *err)
{
    const int rule = build->module_rules[module];
    const tp_module *at = tp_model_module(build->model, module);
    const int weight = tp_model_find_parameter(build->model, module, "weight");
    if (rule < 0 || tp_rules_at(build->rules, rule)->style != TP_STYLE_ROPE ||
        at->kind != TP_MODULE_LINEAR || at->parent < 0 || weight < 0 ||
        build->choices[weight].reason == TP_REASON_FALLBACK_REPLICATED)
        return 0;
    const int64_t size = find_size(build, module);
    const int64_t features = tp_model_parameter(build->model, weight)->shape[0];
    if (size <= 0 || size >= features)
        return tp_fail(
            err, TP_VALUE,
            "rule '%s' (%s): neither '%s' nor the configuration has a "
            "qk_rope_head_dim between 1 and the %lld features of '%s', so it "
            "is not known which of them are positions",
            tp_rules_at(build->rules, rule)->label,
            tp_source_name(tp_rules_at(build->rules, rule)->source),
            tp_model_module(build->model, at->parent)->name, (long long)features,
            at->name);
    out->kind = TP_ROPE;
    out->weight = weight;
    out->bias = tp_model_find_parameter(build->model, module, "bias");
    out->run_start = features - size;
    out->run_length = size;
    return 1;
}
