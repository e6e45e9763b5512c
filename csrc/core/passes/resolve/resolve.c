/* SPDX-License-Identifier: Apache-2.0 */
/* resolve.c -- what a chosen rule comes to for one parameter. */
#include "passes/resolve/resolve.h"

#include <string.h>

#include "passes/choose/choose.h"
#include "passes/resolve/pieces.h"
#include "passes/resolve/raw.h"
#include "plan/view.h"

/* Which dimension of a weight is sharded, and what that is called. */
static const struct {
    tp_module_kind module;
    tp_partition partition;
    tp_kind kind;
    int dim;
} partitions[] = {
    {TP_MODULE_LINEAR, TP_PARTITION_COLUMN, TP_COLUMN, 0},
    {TP_MODULE_LINEAR, TP_PARTITION_ROW, TP_ROW, 1},
    {TP_MODULE_CONV1D, TP_PARTITION_COLUMN, TP_COLUMN, 1},
    {TP_MODULE_CONV1D, TP_PARTITION_ROW, TP_ROW, 0},
    {TP_MODULE_EMBEDDING, TP_PARTITION_COLUMN, TP_HIDDEN, 1},
    {TP_MODULE_EMBEDDING, TP_PARTITION_ROW, TP_VOCABULARY, 0},
};

static int
choose_kind(const tp_module *module, const tp_spec *spec, tp_decision *out,
            tp_error *err)
{
    for (size_t i = 0; i < sizeof(partitions) / sizeof(partitions[0]); i++) {
        if (partitions[i].module == module->kind &&
            partitions[i].partition == spec->partition) {
            out->kind = partitions[i].kind;
            out->dim = partitions[i].dim;
        }
    }
    out->gather_output = spec->gather_output;
    out->split_input = spec->split_input;
    if (module->kind != TP_MODULE_EMBEDDING)
        return 0;

    if (spec->split_input)
        return tp_fail(err, TP_VALUE,
                       "an embedding has no input that could be split; use "
                       "'embedding_rowwise', or leave split_input out");
    /* Of an embedding, an explicit dimension says more than 'column' or 'row'. */
    if (spec->dim >= 0 && spec->shape.dims == 0) {
        out->dim = spec->dim;
        out->kind = spec->dim == 0 ? TP_VOCABULARY : TP_HIDDEN;
    }
    /* What follows an embedding wants the full hidden state. */
    out->gather_output = out->kind == TP_HIDDEN;
    return 0;
}

/* As tp_layout_cache_get, saying in an error which heads or sizes were meant. */
static int
get_layout(tp_build *build, const tp_pieces *pieces, const tp_view *view,
           const tp_layout **out, tp_error *err)
{
    if (tp_layout_cache_get(build->layouts, pieces->piece, pieces->count, pieces->heads,
                            out, err) == 0)
        return 0;
    if (err->code != TP_VALUE)
        return -1;
    const tp_geometry *geometry =
        tp_geometries_at(build->geometries, pieces->attention);
    if (geometry != NULL)
        return tp_fail(
            err, TP_VALUE,
            "module '%s' has %lld query and %lld key/value heads of %lld: %s; use a TP "
            "size that fits the heads, or skip the weights of this module",
            tp_model_module(build->model, pieces->attention)->name,
            (long long)geometry->heads.query, (long long)geometry->heads.key,
            (long long)geometry->head_size, tp_error_text(err));
    return tp_fail(
        err, TP_VALUE,
        "size %lld along dimension %d: %s; use a smaller TP size, or skip this weight",
        (long long)view->size, view->dim, tp_error_text(err));
}

static int
check_matrix(const tp_parameter *weight, tp_error *err)
{
    if (weight->dims != 2)
        return tp_fail(err, TP_VALUE,
                       "the weight of a linear or embedding module has 2 dimensions, "
                       "this one has %d; skip it",
                       weight->dims);
    if (weight->shape[0] == 0 || weight->shape[1] == 0)
        return tp_fail(err, TP_VALUE, "the weight is empty; skip it");
    return 0;
}

static int
shard_weight(tp_build *build, const tp_parameter *weight, const tp_spec *spec,
             tp_decision *out, tp_error *err)
{
    const tp_module *module = tp_model_module(build->model, weight->module);
    tp_view view;
    tp_pieces pieces;
    if (check_matrix(weight, err) < 0 || choose_kind(module, spec, out, err) < 0)
        return -1;
    if (spec->dim >= weight->dims && spec->shape.dims == 0)
        return tp_fail(err, TP_VALUE,
                       "partition_dim is %d, but the weight has dimensions 0 and 1",
                       spec->dim);
    if (tp_view_weight(spec, weight, out->dim, &view, err) < 0)
        return -1;
    if (module->kind == TP_MODULE_EMBEDDING && view.count > 1)
        return tp_fail(err, TP_VALUE,
                       "an embedding is one piece; leave shape out, or write -1 along "
                       "the sharded dimension");
    if (tp_pieces_make(build, weight->module, spec, &view, &pieces, err) < 0 ||
        get_layout(build, &pieces, &view, &out->layout, err) < 0)
        return -1;
    out->outer = view.outer;
    out->inner = view.inner;
    out->attention = pieces.attention;
    out->shards_keys = pieces.shards_keys;
    return 0;
}

/* Turn the error into a message: the user did not ask for what a transformers plan
 * says. */
static int
replicate(tp_build *build, int parameter, tp_error *err)
{
    if (err->code != TP_VALUE)
        return -1;
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "%s; it stays replicated", tp_error_text(err));
    tp_error_clear(err);
    build->decisions[parameter] = (tp_decision)TP_NO_DECISION;
    return tp_build_message(build, &text, err);
}

int
tp_resolve_parameter(tp_build *build, int parameter, tp_error *err)
{
    const tp_parameter *weight = tp_model_parameter(build->model, parameter);
    const tp_choice *choice = &build->choices[parameter];
    tp_decision decision = TP_NO_DECISION;
    if (choice->reason == TP_REASON_FALLBACK_REPLICATED) {
        decision.kind = TP_REPLICATED;
    } else if (choice->spec != NULL && choice->spec->partition == TP_PARTITION_SKIP) {
        decision.kind = choice->spec->sum_gradient ? TP_REPLICATED_SUM : TP_SKIPPED;
    } else if (choice->spec != NULL) {
        const bool raw = tp_raw_is(build->model, parameter);
        const int result =
            raw ? tp_raw_resolve(build, parameter, choice, &decision, err)
                : shard_weight(build, weight, choice->spec, &decision, err);
        if (result < 0) {
            tp_build_refuse(build, parameter, choice, err);
            return raw && choice->source == TP_FROM_HF
                       ? replicate(build, parameter, err)
                       : -1;
        }
    }
    build->decisions[parameter] = decision;
    return 0;
}

static int
resolve_bias(tp_build *build, int bias, int weight, tp_error *err)
{
    const tp_parameter *of = tp_model_parameter(build->model, weight);
    const tp_parameter *is = tp_model_parameter(build->model, bias);
    const tp_decision *from = &build->decisions[weight];
    tp_decision *out = &build->decisions[bias];
    *out = (tp_decision)TP_NO_DECISION;
    build->choices[bias] = build->choices[weight];
    if (from->kind == TP_REPLICATED_SUM || from->kind == TP_SKIPPED)
        out->kind = from->kind;
    if (from->kind != TP_COLUMN)
        return 0; /* a row bias stays replicated and is added once, after the sum */

    if (is->dims != 1 || is->shape[0] != of->shape[from->dim]) {
        tp_fail(err, TP_VALUE,
                "a bias has one dimension of %lld, the output features of its weight",
                (long long)of->shape[from->dim]);
        return tp_build_refuse(build, bias, &build->choices[bias], err);
    }
    *out = *from;
    out->dim = 0;
    tp_view_bias(of, from->dim, &out->outer, &out->inner);
    return 0;
}

int
tp_resolve_weights(tp_build *build, tp_error *err)
{
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        if (tp_choose_weight_of(build, i) >= 0)
            build->decisions[i] = (tp_decision)TP_NO_DECISION;
        else if (tp_resolve_parameter(build, i, err) < 0)
            return -1;
    }
    return 0;
}

int
tp_resolve_biases(tp_build *build, tp_error *err)
{
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const int weight = tp_choose_weight_of(build, i);
        if (weight >= 0 && resolve_bias(build, i, weight, err) < 0)
            return -1;
    }
    return 0;
}
