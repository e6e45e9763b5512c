/* SPDX-License-Identifier: Apache-2.0 */
/* whole_experts.c -- modules of experts of which each rank has some, each whole. */
#include "passes/settle/whole_experts.h"

#define WHERE "tensor_parallel.expert_partition: got 'experts', but "

const char *const tp_whole_experts_keys[] = {"num_experts", NULL};

static const char rule[] = "expert_partition: experts";
static const tp_spec along_experts = {.partition = TP_PARTITION_COLUMN, .dim = 0};

/* The number of experts, or -1 where the module does not say it. */
static int64_t
experts_of(const tp_module *module)
{
    return tp_model_integer(module->integers, module->integer_count,
                            tp_whole_experts_keys);
}

static int
check_module(const tp_build *build, const tp_module *module, tp_error *err)
{
    const int64_t experts = experts_of(module);
    if (module->kind != TP_MODULE_EXPERTS || experts < 1)
        return tp_fail(err, TP_VALUE,
                       WHERE
                       "'%s' (%s) is not known to be given tokens, indices of "
                       "experts and weights, as most experts of transformers are; "
                       "write 'width'",
                       module->name, module->class_name);
    if (experts < build->options->ranks)
        return tp_fail(err, TP_VALUE,
                       WHERE "'%s' has %lld expert%s for %d ranks; write 'width'",
                       module->name, (long long)experts, experts == 1 ? "" : "s",
                       build->options->ranks);
    return 0;
}

/* Why a parameter of the module, or of one inside of it, cannot be sharded along the
 * experts; NULL where it can. */
static const char *
obstacle(const tp_build *build, int module, int index, int64_t experts)
{
    const tp_parameter *at = tp_model_parameter(build->model, index);
    if (at->module != module)
        return "is in a module inside of the experts, and each rank would have a part "
               "of its gradient";
    if (tp_build_first(build, index) != index || build->next_name[index] >= 0)
        return "is tied to another parameter";
    if (build->choices[index].source == TP_FROM_CONFIG)
        return "has a rule of partition_config, too";
    if (at->dims < 2 || at->shape[0] != experts)
        return "has no dimension of experts in front";
    return NULL;
}

static void
decide(tp_build *build, int index, const tp_layout *layout)
{
    const tp_parameter *at = tp_model_parameter(build->model, index);
    tp_decision *out = &build->decisions[index];
    build->choices[index] =
        (tp_choice){&along_experts, build->choices[index].source, rule, TP_REASON_RULE};
    *out = (tp_decision)TP_NO_DECISION;
    out->kind = TP_COLUMN;
    out->dim = 0;
    out->layout = layout;
    for (int i = 1; i < at->dims; i++)
        out->inner *= at->shape[i];
}

static int
settle(tp_build *build, int module, tp_error *err)
{
    const tp_module *at = tp_model_module(build->model, module);
    const int64_t experts = experts_of(at);
    const tp_piece piece = {experts, 1, TP_PIECE_UNITS};
    const tp_layout *layout = NULL;
    if (check_module(build, at, err) < 0 ||
        tp_layout_cache_get(build->layouts, &piece, 1, (tp_heads){0, 0}, &layout, err) <
            0)
        return -1;
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const tp_parameter *own = tp_model_parameter(build->model, i);
        if (!tp_model_is_inside(build->model, own->module, module))
            continue;
        const char *why = obstacle(build, module, i, experts);
        if (why != NULL)
            return tp_fail(err, TP_VALUE, WHERE "'%s' %s; write 'width'", own->name,
                           why);
        decide(build, i, layout);
    }
    return 0;
}

int
tp_whole_experts_settle(tp_build *build, tp_error *err)
{
    bool any = false;
    if (!build->options->whole_experts || build->options->ranks == 1)
        return 0;
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        if (!build->experts[i])
            continue;
        any = true;
        if (settle(build, i, err) < 0)
            return -1;
    }
    /* The self-check may have found that they have to be replicated. */
    if (!any && build->options->replicated_count == 0)
        return tp_fail(err, TP_VALUE,
                       WHERE
                       "no module of the model holds experts that are sharded; "
                       "leave the key out");
    return 0;
}

int
tp_whole_experts_first(const tp_build *build, int module)
{
    const int first = tp_model_first_parameter(build->model, module);
    return first >= 0 && build->choices[first].spec == &along_experts ? first : -1;
}
