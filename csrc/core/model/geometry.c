/* SPDX-License-Identifier: Apache-2.0 */
/* geometry.c -- head counts and head size of the attention modules of a model. */
#include "model/geometry.h"

#include <stdlib.h>
#include <string.h>

#include "base/text.h"
#include "model/adapters.h"

static const char *const head_size_keys[] = {
    "head_dim", "attention_head_size", "head_size",
    "d_kv",     "key_value_proj_dim",  "dim_head",
    NULL};
static const char *const hidden_keys[] = {"hidden_size", "n_embd", "d_model",
                                          "embed_dim", NULL};
const char *const tp_geometry_query_keys[] = {
    "num_heads",   "num_attention_heads", "n_head", "n_heads",
    "num_q_heads", "num_attn_heads",      NULL};
const char *const tp_geometry_key_keys[] = {
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_kv", "kv_heads", NULL};
const char *const tp_geometry_group_keys[] = {"num_key_value_groups", "n_rep", NULL};

/* Attention with one of these makes keys and values from a latent: its queries are
 * longer than head_size says, and may be as many features as a fused q|k|v would be. */
static const char *const latent_keys[] = {"kv_lora_rank", "qk_rope_head_dim",
                                          "qk_nope_head_dim", NULL};

/* Read off the forward functions of these models. */
static const struct {
    const char *model_type;
    const char *leaf;
} interleaved[] = {
    {"bloom", "query_key_value"},     {"falcon", "query_key_value"},
    {"fuyu", "query_key_value"},      {"gpt_bigcode", "c_attn"},
    {"gpt_neox", "query_key_value"},  {"gpt_neox_japanese", "query_key_value"},
    {"persimmon", "query_key_value"},
};

/* What one list of integers says; -1 where it says nothing. */
typedef struct {
    int64_t head_size;
    int64_t hidden;
    int64_t query;
    int64_t key;
    int64_t group;
} counts;

struct tp_geometries {
    const tp_model *model; /* borrowed */
    tp_geometry *modules;  /* one per module; head_size 0: no attention module */
    int *layers;           /* one per module: children that hold a weight */
};

/* A count that is not positive says nothing. */
static int64_t
read_count(const tp_integer *integers, int count, const char *const *keys)
{
    const int64_t value = tp_model_integer(integers, count, keys);
    return value > 0 ? value : -1;
}

static counts
read_counts(const tp_integer *integers, int count)
{
    return (counts){
        .head_size = read_count(integers, count, head_size_keys),
        .hidden = read_count(integers, count, hidden_keys),
        .query = read_count(integers, count, tp_geometry_query_keys),
        .key = read_count(integers, count, tp_geometry_key_keys),
        .group = read_count(integers, count, tp_geometry_group_keys),
    };
}

/* The quotient, or -1 where there is none. */
static int64_t
quotient(int64_t size, int64_t by)
{
    return size > 0 && by > 0 && size % by == 0 ? size / by : -1;
}

static int64_t
first_known(int64_t a, int64_t b, int64_t c, int64_t d)
{
    return a > 0 ? a : b > 0 ? b : c > 0 ? c : d;
}

/* What a module says about itself comes first. The configuration may speak of
 * another part of the model (the text half, say, when this is an image
 * encoder): it is believed only where its query heads are the module's. */
static tp_geometry
make_geometry(const counts *own, const counts *config)
{
    static const counts nothing = {-1, -1, -1, -1, -1};
    const tp_geometry none = {{0, 0}, 0, false, false, false};
    if (own->head_size < 0 && own->query < 0)
        return none;
    const int64_t query = own->query > 0 ? own->query : config->query;
    const counts *also = query == config->query ? config : &nothing;

    const int64_t head_size =
        first_known(own->head_size, also->head_size, quotient(own->hidden, query),
                    quotient(also->hidden, query));
    const int64_t key =
        first_known(own->key, quotient(query, own->group), also->key,
                    also->group > 0 ? quotient(query, also->group) : query);
    if (query <= 0 || head_size <= 0 || key <= 0)
        return none;
    /* The features of queries, keys and values are added up elsewhere. */
    int64_t queries, keys;
    if (__builtin_mul_overflow(query, head_size, &queries) ||
        __builtin_mul_overflow(key, head_size, &keys) || queries > INT64_MAX / 4 ||
        keys > INT64_MAX / 4)
        return none;
    return (tp_geometry){{query, key}, head_size, false, false, false};
}

static void
find_separate_keys(tp_geometries *geometries)
{
    const tp_model *model = geometries->model;
    for (int i = 0; i < tp_model_module_count(model); i++) {
        const tp_module *module = tp_model_module(model, i);
        if (!tp_module_is_layer(module))
            continue;
        const int attention = tp_geometries_find(geometries, i);
        const int index = tp_model_find_parameter(model, i, "weight");
        if (index < 0 || tp_geometries_at(geometries, attention) == NULL)
            continue;
        tp_geometry *geometry = &geometries->modules[attention];
        const tp_parameter *weight = tp_model_parameter(model, index);
        const int64_t *shape = weight->shape;
        const int64_t out = module->kind == TP_MODULE_CONV1D ? shape[1] : shape[0];
        if (weight->dims == 2 && geometry->heads.key != geometry->heads.query &&
            out == geometry->heads.key * geometry->head_size)
            geometry->separate_keys = true;
    }
}

int
tp_geometries_new(const tp_model *model, tp_geometries **out, tp_error *err)
{
    const int count = tp_model_module_count(model);
    *out = NULL;
    tp_geometries *geometries = calloc(1, sizeof(*geometries));
    if (geometries == NULL)
        return tp_fail_memory(err);
    geometries->model = model;
    geometries->modules = calloc((size_t)count + 1, sizeof(*geometries->modules));
    geometries->layers = calloc((size_t)count + 1, sizeof(*geometries->layers));
    if (geometries->modules == NULL || geometries->layers == NULL) {
        tp_geometries_free(geometries);
        return tp_fail_memory(err);
    }

    const tp_model_facts *facts = tp_model_get_facts(model);
    const counts config = read_counts(facts->integers, facts->integer_count);
    for (int i = 0; i < count; i++) {
        const tp_module *module = tp_model_module(model, i);
        if (tp_module_is_layer(module)) {
            if (module->parent >= 0)
                geometries->layers[module->parent]++;
            continue;
        }
        const counts own = read_counts(module->integers, module->integer_count);
        geometries->modules[i] = make_geometry(&own, &config);
        const bool latent =
            read_count(module->integers, module->integer_count, latent_keys) > 0;
        geometries->modules[i].latent = latent;
        geometries->modules[i].separate_keys = latent;
    }
    find_separate_keys(geometries);
    *out = geometries;
    return 0;
}

int
tp_geometries_find(const tp_geometries *geometries, int module)
{
    int parent = tp_model_module(geometries->model, module)->parent;
    /* What an adapter has for a layer is one deeper than the layer itself. */
    if (parent >= 0 &&
        tp_adapters_is_list(tp_model_module(geometries->model, parent)->name))
        parent = tp_model_module(geometries->model, parent)->parent;
    if (parent < 0 || geometries->modules[parent].head_size > 0)
        return parent;
    const int grandparent = tp_model_module(geometries->model, parent)->parent;
    if (grandparent < 0 || geometries->layers[parent] != 1)
        return -1;
    return geometries->modules[grandparent].head_size > 0 ? grandparent : -1;
}

const tp_geometry *
tp_geometries_at(const tp_geometries *geometries, int module)
{
    if (module < 0 || geometries->modules[module].head_size == 0)
        return NULL;
    return &geometries->modules[module];
}

void
tp_geometries_set(tp_geometries *geometries, int module, const tp_geometry *guessed)
{
    geometries->modules[module] = *guessed;
}

bool
tp_geometry_interleaved(const char *model_type, const char *leaf)
{
    if (model_type == NULL)
        return false;
    for (size_t i = 0; i < sizeof(interleaved) / sizeof(interleaved[0]); i++) {
        if (tp_text_same(interleaved[i].model_type, model_type) &&
            strcmp(interleaved[i].leaf, leaf) == 0)
            return true;
    }
    return false;
}

void
tp_geometries_free(tp_geometries *geometries)
{
    if (geometries == NULL)
        return;
    free(geometries->modules);
    free(geometries->layers);
    free(geometries);
}
