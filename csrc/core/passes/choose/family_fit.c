/* SPDX-License-Identifier: Apache-2.0 */
/* family_fit.c -- whether the sizes of layers are those of a block. */
#include "passes/choose/family_fit.h"

#include <stddef.h>

#include "model/adapters.h"
#include "model/head_counts.h"
#include "rules/families.h"

int
tp_family_weight(const tp_build *build, int module)
{
    return tp_model_find_parameter(build->model, module, "weight");
}

/* Features that a layer gives, or takes; -1 where it is no matrix. */
static int64_t
features(const tp_build *build, int module, bool given)
{
    const int weight = tp_family_weight(build, module);
    const tp_parameter *at =
        weight < 0 ? NULL : tp_model_parameter(build->model, weight);
    if (at == NULL || at->dims != 2)
        return -1;
    const bool first =
        given == (tp_model_module(build->model, module)->kind == TP_MODULE_LINEAR);
    return at->shape[first ? 0 : 1];
}

/* Guess the heads of attention whose counts have names that are not known, in a model
 * of a type that was never tried. */
static void
guess_heads(const tp_build *build, tp_family_found *at)
{
    const int64_t query = features(build, at->output, false);
    const int64_t first = features(build, at->inputs[0], true);
    const int64_t key =
        at->count == 1 ? (first - query) / 2 : features(build, at->inputs[1], true);
    const int parent = tp_adapters_parent(build->model, at->inputs[0]);
    const char *type = tp_model_get_facts(build->model)->model_type;
    tp_geometry found = {.separate_keys = at->count > 1 && key != query,
                         .guessed = true};
    if (parent < 0 || tp_family_is_tried(type) ||
        !tp_head_counts_guess(tp_model_module(build->model, parent), query, key,
                              &found.heads, &found.head_size))
        return;
    tp_geometries_set(build->geometries, parent, &found);
    at->attention = parent;
}

/* Whether the sizes of an attention block are those of its heads. */
static bool
heads_fit(const tp_build *build, tp_family_found *at)
{
    at->attention = tp_geometries_find(build->geometries, at->inputs[0]);
    if (tp_geometries_at(build->geometries, at->attention) == NULL)
        guess_heads(build, at);
    const tp_geometry *geometry = tp_geometries_at(build->geometries, at->attention);
    if (geometry == NULL)
        return false;
    const int64_t query = geometry->heads.query * geometry->head_size;
    const int64_t key = geometry->heads.key * geometry->head_size;
    const int64_t first = features(build, at->inputs[0], true);
    if (features(build, at->output, false) != query)
        return false;
    if (at->count == 1)
        return first == query + 2 * key &&
               (at->row->groups == 0 ||
                geometry->heads.query % (at->row->groups * build->options->ranks) == 0);
    for (int i = 1; i < at->count; i++) {
        if (features(build, at->inputs[i], true) != key)
            return false;
    }
    return first == query;
}

static bool
features_fit(const tp_build *build, const tp_family_found *at)
{
    const int64_t size = features(build, at->output, false);
    if (size < build->options->ranks)
        return false;
    if (at->count == 1 && features(build, at->inputs[0], true) == 2 * size)
        return true;
    for (int i = 0; i < at->count; i++) {
        if (features(build, at->inputs[i], true) != size)
            return false;
    }
    return true;
}

int
tp_family_pieces(const tp_build *build, const tp_family_found *at, bool input)
{
    if (at->row->groups > 0)
        return at->row->groups * (input ? 3 : 1);
    const bool both =
        input && !at->row->heads && at->count == 1 &&
        features(build, at->inputs[0], true) == 2 * features(build, at->output, false);
    return both ? 2 : 1;
}

const char *
tp_family_misfit(const tp_build *build, tp_family_found *at)
{
    if (at->row->heads ? heads_fit(build, at) : features_fit(build, at))
        return NULL;
    if (!at->row->heads)
        return "the features that its column layers give are not those that its row "
               "layer takes";
    if (tp_geometries_at(build->geometries, at->attention) == NULL)
        return "how many heads it has is not known: let its module have the integers "
               "num_heads and head_dim, or write rules";
    return "its sizes are not those of full heads that the ranks could share";
}
