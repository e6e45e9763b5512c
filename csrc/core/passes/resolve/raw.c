/* SPDX-License-Identifier: Apache-2.0 */
/* raw.c -- what a rule comes to for a parameter that is no layer's weight. */
#include "passes/resolve/raw.h"

#include <string.h>

#include "passes/resolve/pieces.h"
#include "plan/view.h"

bool
tp_raw_is(const tp_model *model, int parameter)
{
    const tp_parameter *at = tp_model_parameter(model, parameter);
    return !tp_module_is_layer(tp_model_module(model, at->module)) ||
           (strcmp(at->leaf, "weight") != 0 && strcmp(at->leaf, "bias") != 0);
}

/* The scale or shift of a norm, which works on features that others make. */
static bool
is_norm(const tp_parameter *at)
{
    return at->dims == 1 &&
           (strcmp(at->leaf, "weight") == 0 || strcmp(at->leaf, "bias") == 0);
}

/* Whether torch.nn.utils.parametrize, or the older weight_norm, computes a weight from
 * it. The kernel of weight_norm compares no sizes: from a shard of one tensor and all
 * of the other it reads and writes memory that is neither's. */
static bool
is_parametrized(const tp_model *model, const tp_parameter *at)
{
    const tp_module *module = tp_model_module(model, at->module);
    if (strcmp(module->class_name, "ParametrizationList") == 0)
        return true;
    return (strcmp(at->leaf, "weight_g") == 0 || strcmp(at->leaf, "weight_v") == 0) &&
           tp_model_find_parameter(model, at->module, "weight_g") >= 0 &&
           tp_model_find_parameter(model, at->module, "weight_v") >= 0;
}

static int
check(const tp_model *model, const tp_parameter *at, const tp_choice *choice,
      tp_error *err)
{
    const tp_spec *spec = choice->spec;
    if (is_parametrized(model, at))
        return tp_fail(err, TP_VALUE,
                       "a parametrization of torch.nn.utils computes a weight from it, "
                       "which needs all of it; narrow the pattern, or remove the "
                       "parametrization before the model is sharded");
    if (is_norm(at) && choice->source != TP_FROM_HF)
        return tp_fail(err, TP_VALUE,
                       "it is not a linear or embedding weight: narrow the pattern, or "
                       "put a rule with partition_type 'skip' for this parameter in "
                       "front");
    if (at->dims == 0 || (at->dims == 1 && spec->partition == TP_PARTITION_ROW))
        return tp_fail(err, TP_VALUE,
                       "a parameter of %d dimension%s has no input features; skip it",
                       at->dims, at->dims == 1 ? "" : "s");
    if (spec->gather_output || spec->split_input)
        return tp_fail(err, TP_VALUE,
                       "it is no layer of its own, so nothing can be gathered or split "
                       "around it; leave %s out",
                       spec->gather_output ? "gather_output" : "split_input");
    for (int i = 0; i < at->dims; i++) {
        if (at->shape[i] == 0)
            return tp_fail(err, TP_VALUE, "the parameter is empty; skip it");
    }
    return 0;
}

static int
sharded_dim(const tp_parameter *at, const tp_spec *spec, int *out, tp_error *err)
{
    if (spec->dim >= at->dims && spec->shape.dims <= at->dims)
        return tp_fail(err, TP_VALUE, "partition_dim is %d, but it has %d dimension%s",
                       spec->dim, at->dims, at->dims == 1 ? "" : "s");
    if (spec->dim >= 0 && spec->shape.dims <= at->dims)
        *out = spec->dim;
    else if (at->dims == 1)
        *out = 0;
    else
        *out = spec->partition == TP_PARTITION_COLUMN ? at->dims - 2 : at->dims - 1;
    return 0;
}

/* A shape of two sizes is that of a matrix, and says what the pieces are along its
 * sharded dimension; here the same with one size per dimension of the parameter. */
static tp_spec
widen(const tp_spec *spec, const tp_parameter *at, int dim)
{
    tp_spec wide = *spec;
    const int along = spec->partition == TP_PARTITION_COLUMN ? 0 : 1;
    if (spec->shape.dims != 2 || at->dims == 2 || spec->shape.sizes[1 - along] != -1)
        return wide;
    wide.shape.dims = at->dims;
    for (int i = 0; i < at->dims; i++)
        wide.shape.sizes[i] = -1;
    wide.shape.sizes[dim] = spec->shape.sizes[along];
    wide.dim = -1;
    return wide;
}

/* A vector may follow the heads of the module beside it; a tensor of experts has none.
 */
static int
attention_of(const tp_build *build, const tp_parameter *at)
{
    if (tp_geometries_at(build->geometries, at->module) != NULL)
        return at->module;
    return at->dims == 1 ? tp_geometries_find(build->geometries, at->module) : -1;
}

/* A plan of transformers may call a gate and what it gates one piece; in every model
 * with such a plan one follows the other. */
static void
part_pair(const tp_parameter *at, const tp_choice *choice, tp_view *view)
{
    if (choice->source != TP_FROM_HF || view->count != 1 || view->size % 2 != 0 ||
        at->dims == 1 || !tp_pieces_paired(at->leaf))
        return;
    view->count = 2;
    view->piece[0] = view->piece[1] = view->size / 2;
}

int
tp_raw_resolve(tp_build *build, int parameter, const tp_choice *choice,
               tp_decision *out, tp_error *err)
{
    const tp_parameter *at = tp_model_parameter(build->model, parameter);
    int dim = -1;
    if (check(build->model, at, choice, err) < 0 ||
        sharded_dim(at, choice->spec, &dim, err) < 0)
        return -1;
    const tp_spec spec = widen(choice->spec, at, dim);
    tp_view view;
    tp_pieces pieces;
    if (tp_view_weight(&spec, at, dim, &view, err) < 0)
        return -1;
    part_pair(at, choice, &view);
    const bool experts = at->dims > 1 && (choice->reason == TP_REASON_FAMILY ||
                                          tp_build_in_experts(build, at->module));
    tp_pieces_raw(build, at, attention_of(build, at), &view, experts, &pieces);
    if (tp_layout_cache_get(build->layouts, pieces.piece, pieces.count, pieces.heads,
                            &out->layout, err) < 0)
        return -1;
    out->kind = spec.partition == TP_PARTITION_COLUMN ? TP_COLUMN : TP_ROW;
    out->dim = dim;
    out->outer = view.outer;
    out->inner = view.inner;
    out->attention = pieces.attention;
    out->shards_keys = pieces.shards_keys;
    return 0;
}

void
tp_raw_follow(tp_build *build, int parameter, int from, int dim)
{
    const tp_parameter *at = tp_model_parameter(build->model, parameter);
    tp_decision *out = &build->decisions[parameter];
    build->choices[parameter] = build->choices[from];
    *out = build->decisions[from];
    /* A view may split the dimension itself, in the same way for both. */
    tp_view_bias(tp_model_parameter(build->model, from), out->dim, &out->outer,
                 &out->inner);
    out->dim = dim;
    for (int i = 0; i < at->dims; i++) {
        if (i < dim)
            out->outer *= at->shape[i];
        else if (i > dim)
            out->inner *= at->shape[i];
    }
}
