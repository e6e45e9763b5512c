/* SPDX-License-Identifier: Apache-2.0 */
/* family_experts.c -- experts whose tensors are sharded because names and sizes say so.
 */
#include "passes/choose/family_experts.h"

#include <string.h>

#include "base/text.h"
#include "model/names.h"
#include "passes/choose/choose.h"
#include "passes/choose/family_blocks.h"
#include "rules/families.h"

enum { MATRIX_DIMS = 3, STACKED_DIMS = 2 };

/* The experts of one module. */
typedef struct {
    const tp_family_experts *row;
    int output; /* parameters */
    int inputs[TP_FAMILY_INPUTS];
    int count;
    int64_t experts;
    int64_t features; /* of one expert, between its layers */
    bool turned;      /* [experts, in, out] */
} group;

static const char *const hidden_keys[] = {"hidden_size", "n_embd", "d_model", NULL};
static const char *const count_keys[] = {"moe_num_experts", "num_experts",
                                         "num_local_experts", NULL};

static bool
is_free(const tp_build *build, int parameter, int dims)
{
    const tp_parameter *at = tp_model_parameter(build->model, parameter);
    if (at->dims != dims || tp_choose_is_taken(build, parameter) ||
        build->next_name[tp_build_first(build, parameter)] >= 0)
        return false;
    for (int i = at->module; i >= 0; i = tp_model_module(build->model, i)->parent) {
        if (build->module_rules[i] >= 0)
            return false;
    }
    return true;
}

/* The weight of the module called `leaf` right inside of `parent`, which is no layer
 * that is individually sharded. -1: none. Modules come after their parents. */
static int
weight_inside(const tp_model *model, int parent, const char *leaf)
{
    const int count = tp_model_module_count(model);
    for (int i = parent + 1; i < count && tp_model_module(model, i)->parent >= parent;
         i++) {
        const tp_module *at = tp_model_module(model, i);
        if (at->parent == parent && strcmp(tp_names_leaf(at->name), leaf) == 0)
            return tp_module_is_layer(at) ? -1
                                          : tp_model_find_parameter(model, i, "weight");
    }
    return -1;
}

static int
find_tensor(const tp_build *build, const tp_family_experts *row, int module,
            const char *name)
{
    const int found = row->form == TP_EXPERT_MODULES
                          ? weight_inside(build->model, module, name)
                          : tp_model_find_parameter(build->model, module, name);
    const int dims = row->form == TP_EXPERT_STACKS ? STACKED_DIMS : MATRIX_DIMS;
    return found >= 0 && is_free(build, found, dims) ? found : -1;
}

static bool
find_group(const tp_build *build, const tp_family_experts *row, int module, group *out)
{
    *out = (group){.row = row};
    out->output = find_tensor(build, row, module, row->output);
    if (out->output < 0)
        return false;
    while (out->count < TP_FAMILY_INPUTS && row->inputs[out->count] != NULL) {
        const int input = find_tensor(build, row, module, row->inputs[out->count]);
        if (input < 0)
            return false;
        out->inputs[out->count++] = input;
    }
    return true;
}

/* Whether the layers fit together when each is [experts, out, in], or turned. One input
 * layer of twice the features is a gate beside what it gates. */
static bool
fits(const tp_build *build, const group *at, bool turned, int64_t *features)
{
    const tp_model_facts *facts = tp_model_get_facts(build->model);
    const int out = turned ? 2 : 1, in = turned ? 1 : 2;
    const int64_t *last = tp_model_parameter(build->model, at->output)->shape;
    const int64_t hidden =
        tp_model_integer(facts->integers, facts->integer_count, hidden_keys);
    if (hidden > 0 && last[out] != hidden)
        return false;
    *features = last[in];
    for (int i = 0; i < at->count; i++) {
        const int64_t *first = tp_model_parameter(build->model, at->inputs[i])->shape;
        if (first[0] != last[0] || first[in] != last[out] ||
            (first[out] != last[in] && (at->count > 1 || first[out] != 2 * last[in])))
            return false;
    }
    return true;
}

static bool
fit_matrices(const tp_build *build, group *at)
{
    int64_t straight = 0, turned = 0;
    const bool is_straight = fits(build, at, false, &straight);
    const bool is_turned = fits(build, at, true, &turned);
    at->experts = tp_model_parameter(build->model, at->output)->shape[0];
    at->turned = is_turned;
    at->features = is_turned ? turned : straight;
    return is_straight != is_turned;
}

/* All layers are [experts * features, hidden]. */
static bool
fit_stacks(const tp_build *build, int module, group *at)
{
    const tp_module *holder = tp_model_module(build->model, module);
    const int64_t *last = tp_model_parameter(build->model, at->output)->shape;
    at->experts = tp_model_integer(holder->integers, holder->integer_count, count_keys);
    if (at->experts <= 0 || last[0] % at->experts != 0 || holder->parent < 0)
        return false;
    at->features = last[0] / at->experts;
    for (int i = 0; i < at->count; i++) {
        const int64_t *first = tp_model_parameter(build->model, at->inputs[i])->shape;
        if (first[0] != last[0] || first[1] != last[1])
            return false;
    }
    return true;
}

/* The features are in the first or the last dimension but the experts. */
static tp_spec
spec_of(const tp_build *build, const group *at, int parameter)
{
    const int64_t *sizes = tp_model_parameter(build->model, parameter)->shape;
    const bool output = parameter == at->output;
    tp_spec spec = TP_NO_SPEC;
    if (at->row->form == TP_EXPERT_STACKS) {
        spec.dim = 1;
        spec.shape = (tp_shape){.dims = MATRIX_DIMS,
                                .sizes = {at->experts, at->features, sizes[1]}};
        return spec;
    }
    spec.partition = output ? TP_PARTITION_ROW : TP_PARTITION_COLUMN;
    spec.dim = output == at->turned ? 1 : 2;
    if (!output && !at->row->turns && sizes[spec.dim] == 2 * at->features) {
        spec.shape = (tp_shape){.dims = MATRIX_DIMS, .sizes = {-1, -1, -1}};
        spec.shape.sizes[spec.dim] = 2;
    }
    return spec;
}

static int
choose(tp_build *build, const group *at, int parameter, tp_error *err)
{
    const char *type = tp_model_get_facts(build->model)->model_type;
    tp_spec *spec = tp_arena_take(build->plan->arena, 1, sizeof(*spec), err);
    if (spec == NULL)
        return -1;
    *spec = spec_of(build, at, parameter);
    build->choices[parameter] =
        (tp_choice){spec, tp_family_is_tried(type) ? TP_FROM_FAMILY : TP_FROM_HEURISTIC,
                    at->row->output, TP_REASON_FAMILY};
    return 0;
}

/* Whether the experts are projections of attention, whose features are heads. */
static bool
is_attention(const tp_build *build, int module)
{
    const int parent = tp_model_module(build->model, module)->parent;
    return tp_geometries_at(build->geometries, module) != NULL ||
           tp_geometries_at(build->geometries, parent) != NULL;
}

/* The first row whose tensors are all there decides. */
static int
try_module(tp_build *build, int module, tp_error *err)
{
    const char *type = tp_model_get_facts(build->model)->model_type;
    for (int i = 0; i < tp_family_experts_count; i++) {
        const tp_family_experts *row = &tp_family_experts_rows[i];
        group at;
        if ((row->model_type != NULL &&
             (type == NULL || !tp_text_same(row->model_type, type))) ||
            !find_group(build, row, module, &at))
            continue;
        const bool stacked = row->form == TP_EXPERT_STACKS;
        const bool fitting =
            stacked ? fit_stacks(build, module, &at) : fit_matrices(build, &at);
        if (!fitting || at.features < build->options->ranks ||
            is_attention(build, module))
            return 0;
        int result = choose(build, &at, at.output, err);
        for (int j = 0; result == 0 && j < at.count; j++)
            result = choose(build, &at, at.inputs[j], err);
        if (stacked)
            build->stacked[tp_model_module(build->model, module)->parent] = at.output;
        build->paired++;
        return result;
    }
    return 0;
}

int
tp_family_experts_choose(tp_build *build, tp_error *err)
{
    int result = 0;
    if (!tp_family_may_choose(build))
        return 0;
    for (int i = 0; result == 0 && i < tp_model_module_count(build->model); i++)
        result = try_module(build, i, err);
    return result;
}
