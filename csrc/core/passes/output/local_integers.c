/* SPDX-License-Identifier: Apache-2.0 */
/* local_integers.c -- the integers of attention and of experts that become local. */
#include "passes/output/local_integers.h"

#include <stdlib.h>
#include <string.h>

#include "model/head_counts.h"
#include "model/names.h"
#include "passes/settle/whole_experts.h"

/* The heads of each rank, for modules with the same counts and the same sharded heads.
 */
typedef struct {
    tp_heads heads;
    int64_t head_size;
    bool shards_keys;
    const int64_t *values[TP_COUNTS_KINDS]; /* of each count, one per rank */
} spread;

/* What the features of all query heads are called in attention modules, and those of
 * all key heads. Most forwards gather the heads to this width again. */
static const char *const query_width_keys[] = {"embed_dim",
                                               "split_size",
                                               "all_head_size",
                                               "hidden_size",
                                               "inner_dim",
                                               "d_model",
                                               "d_model_size",
                                               "dim",
                                               "dim_model",
                                               "hidden_dim",
                                               "attention_hidden_size",
                                               "d_attn",
                                               "attn_dim",
                                               "n_embd",
                                               "n_state",
                                               "q_size",
                                               NULL};
static const char *const key_width_keys[] = {"kv_dim", "kv_size", "kv_hidden_size",
                                             "kv_projection_size", NULL};

typedef struct {
    char *sharded;   /* one per module: bit 0 heads are sharded, bit 1 keys too */
    spread *spreads; /* the distinct ones; few */
    int count;
    int room;
} workspace;

static bool
has_own_key(const char *const *keys, const char *key)
{
    for (; *keys != NULL; keys++) {
        if (strcmp(*keys, key) == 0)
            return true;
    }
    return false;
}

/* An integer of the configuration object that a module holds, which some forwards
 * read in the place of the module's own, is called "config.<key>". */
static bool
has_key(const char *const *keys, const char *key)
{
    const size_t size = strlen("config.");
    return has_own_key(keys, strncmp(key, "config.", size) == 0 ? key + size : key);
}

static bool
differs(const int64_t *values, int ranks, int64_t full)
{
    for (int rank = 0; rank < ranks; rank++) {
        if (values[rank] != full)
            return true;
    }
    return false;
}

static int
make_spread(const tp_build *build, int module, spread *out, tp_error *err)
{
    const int ranks = build->options->ranks;
    int64_t *values[TP_COUNTS_KINDS] = {NULL};
    for (int i = TP_COUNTS_QUERY_HEADS; i < TP_COUNTS_KINDS; i++) {
        values[i] =
            tp_arena_take(build->plan->arena, (size_t)ranks, sizeof(int64_t), err);
        if (values[i] == NULL)
            return -1;
        out->values[i] = values[i];
    }
    for (int rank = 0; rank < ranks; rank++) {
        tp_heads own;
        if (tp_heads_of_rank(out->heads, ranks, rank, &own, err) < 0)
            return -1;
        if (!out->shards_keys)
            own.key = out->heads.key;
        if (own.query % own.key != 0)
            return tp_fail(
                err, TP_VALUE,
                "module '%s': rank %d of %d has %lld query heads over %lld key/value "
                "heads, which are replicated, and they do not fall into equal groups; "
                "shard keys and values, too, or skip the weights of this module",
                tp_model_module(build->model, module)->name, rank, ranks,
                (long long)own.query, (long long)own.key);
        values[TP_COUNTS_QUERY_HEADS][rank] = own.query;
        values[TP_COUNTS_KEY_HEADS][rank] = own.key;
        values[TP_COUNTS_GROUP][rank] = own.query / own.key;
        values[TP_COUNTS_QUERY_WIDTH][rank] = own.query * out->head_size;
        values[TP_COUNTS_KEY_WIDTH][rank] = own.key * out->head_size;
    }
    return 0;
}

static int
find_spread(const tp_build *build, int module, workspace *work, const spread **out,
            tp_error *err)
{
    const tp_geometry *geometry = tp_geometries_at(build->geometries, module);
    const tp_heads heads = geometry->heads;
    const bool shards_keys = (work->sharded[module] & 2) != 0;
    for (int i = 0; i < work->count; i++) {
        const spread *held = &work->spreads[i];
        if (held->heads.query == heads.query && held->heads.key == heads.key &&
            held->head_size == geometry->head_size &&
            held->shards_keys == shards_keys) {
            *out = held;
            return 0;
        }
    }
    if (work->count == work->room) {
        const int room = work->room == 0 ? 8 : work->room * 2;
        spread *grown = realloc(work->spreads, (size_t)room * sizeof(*grown));
        if (grown == NULL)
            return tp_fail_memory(err);
        work->spreads = grown;
        work->room = room;
    }
    spread *made = &work->spreads[work->count];
    *made = (spread){
        .heads = heads, .head_size = geometry->head_size, .shards_keys = shards_keys};
    if (make_spread(build, module, made, err) < 0)
        return -1;
    work->count++;
    *out = made;
    return 0;
}

/* What an integer says of a module with these heads, by its name. */
static tp_head_count
meaning_of(const tp_integer *integer, tp_heads heads, int64_t head_size)
{
    const int64_t full = integer->value;
    if (full == heads.query && has_key(tp_geometry_query_keys, integer->key))
        return TP_COUNTS_QUERY_HEADS;
    if (full == heads.key && has_key(tp_geometry_key_keys, integer->key))
        return TP_COUNTS_KEY_HEADS;
    if (full == heads.query / heads.key &&
        has_key(tp_geometry_group_keys, integer->key))
        return TP_COUNTS_GROUP;
    if (full == heads.query * head_size && has_own_key(query_width_keys, integer->key))
        return TP_COUNTS_QUERY_WIDTH;
    if (full == heads.key * head_size && has_own_key(key_width_keys, integer->key))
        return TP_COUNTS_KEY_WIDTH;
    return TP_COUNTS_NOTHING;
}

/* Whether the module views tensors as experts of so many features, or has some of the
 * experts. */
static bool
counts_experts(const tp_build *build, int module)
{
    return build->experts[module] &&
           (build->stacked[module] >= 0 || tp_whole_experts_first(build, module) >= 0);
}

/* What the module calls the sharded dimension of its experts, which is as large as the
 * `weight`'s. */
static int
add_widths(const tp_build *build, int module, int weight, const char *const *keys,
           tp_error *err)
{
    tp_plan *plan = build->plan;
    const tp_layout *layout = build->decisions[weight].layout;
    const tp_module *at = tp_model_module(build->model, module);
    int64_t *widths =
        tp_arena_take(plan->arena, (size_t)plan->ranks, sizeof(*widths), err);
    if (widths == NULL)
        return -1;
    for (int rank = 0; rank < plan->ranks; rank++)
        widths[rank] = layout->shards[rank].width;
    for (int i = 0; i < at->integer_count; i++) {
        const tp_integer *integer = &at->integers[i];
        if (integer->value == layout->size && has_own_key(keys, integer->key))
            plan->integers[plan->integer_count++] =
                (tp_local_integer){module, integer->key, integer->value, widths};
    }
    return 0;
}

/* A module that views them has the features of one expert, one of whole experts their
 * number. */
static int
add_experts(const tp_build *build, int module, tp_error *err)
{
    static const char *const features[] = {"ffn_hidden_size", "intermediate_size",
                                           NULL};
    const int whole = tp_whole_experts_first(build, module);
    return whole >= 0
               ? add_widths(build, module, whole, tp_whole_experts_keys, err)
               : add_widths(build, module, build->stacked[module], features, err);
}

static int
mark_shards(const tp_build *build, workspace *work, tp_error *err)
{
    const size_t modules = (size_t)tp_model_module_count(build->model);
    work->sharded = calloc(modules + 1, sizeof(*work->sharded));
    if (work->sharded == NULL)
        return tp_fail_memory(err);
    int room = 0;
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const tp_decision *decision = &build->decisions[i];
        if (decision->attention < 0)
            continue;
        char *sharded = &work->sharded[decision->attention];
        if (*sharded == 0)
            room += tp_model_module(build->model, decision->attention)->integer_count;
        *sharded = (char)(*sharded | 1 | (decision->shards_keys ? 2 : 0));
    }
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        if (counts_experts(build, i))
            room += tp_model_module(build->model, i)->integer_count;
    }
    tp_plan *plan = build->plan;
    plan->integers =
        tp_arena_take(plan->arena, (size_t)room + 1, sizeof(*plan->integers), err);
    return plan->integers == NULL ? -1 : 0;
}

/* Attention without keys of its own is given those of another layer, which are sharded
 * where they are made. */
static void
share_keys(const tp_build *build, workspace *work)
{
    const int modules = tp_model_module_count(build->model);
    for (int i = 0; i < modules; i++) {
        if (work->sharded[i] != 1 ||
            tp_geometries_at(build->geometries, i)->separate_keys)
            continue;
        for (int j = 0; j < modules && work->sharded[i] == 1; j++) {
            const tp_geometry *own = tp_geometries_at(build->geometries, i);
            const tp_geometry *other = tp_geometries_at(build->geometries, j);
            if ((work->sharded[j] & 2) != 0 &&
                tp_names_are_alike(tp_model_module(build->model, i)->name,
                                   tp_model_module(build->model, j)->name) &&
                other->heads.query == own->heads.query &&
                other->heads.key == own->heads.key)
                work->sharded[i] |= 2;
        }
    }
}

static void
add_integers(const tp_build *build, int module, const spread *heads)
{
    tp_plan *plan = build->plan;
    const tp_module *at = tp_model_module(build->model, module);
    const tp_geometry *geometry = tp_geometries_at(build->geometries, module);
    for (int i = 0; i < at->integer_count; i++) {
        const tp_integer *integer = &at->integers[i];
        const tp_head_count meaning =
            (geometry->guessed ? tp_head_counts_meaning : meaning_of)(
                integer, heads->heads, heads->head_size);
        const int64_t *values = heads->values[meaning];
        if (values != NULL && differs(values, plan->ranks, integer->value))
            plan->integers[plan->integer_count++] =
                (tp_local_integer){module, integer->key, integer->value, values};
    }
}

int
tp_local_integers_make(tp_build *build, tp_error *err)
{
    workspace work = {NULL, NULL, 0, 0};
    int result = mark_shards(build, &work, err);
    if (result == 0)
        share_keys(build, &work);
    const int modules = tp_model_module_count(build->model);
    for (int i = 0; result == 0 && i < modules; i++) {
        const spread *heads = NULL;
        if (counts_experts(build, i))
            result = add_experts(build, i, err);
        if (result < 0 || work.sharded[i] == 0)
            continue;
        result = find_spread(build, i, &work, &heads, err);
        if (result == 0)
            add_integers(build, i, heads);
    }
    free(work.sharded);
    free(work.spreads);
    return result;
}
