/* SPDX-License-Identifier: Apache-2.0 */
/* pieces.c -- what the pieces of a viewed weight are: heads, units or plain. */
#include "passes/resolve/pieces.h"

#include <string.h>

#include "layout/split.h"
#include "model/adapters.h"
#include "model/names.h"

static void
add_piece(tp_pieces *out, int64_t size, int64_t unit, tp_piece_role role)
{
    out->piece[out->count++] = (tp_piece){size, unit, role};
}

/* What `size` features are sharded in. Those that the ranks divide stay equal, but
 * experts', which grouped GEMMs may not take then: these are in aligned units wherever
 * each rank gets one. */
static int64_t
unit_of(const tp_build *build, int64_t size, bool experts)
{
    const int ranks = build->options->ranks;
    const int64_t aligned = build->aligned;
    const bool fits = experts && size / aligned >= ranks;
    return size % ranks == 0 && !fits ? build->options->grain : aligned;
}

static void
mark_heads(tp_pieces *out, const tp_geometry *geometry, int attention, bool shards_keys)
{
    out->heads = geometry->heads;
    out->attention = attention;
    /* With as many key/value heads as query heads their weights look alike, and
     * a rule that shards one kind and not the other would make no sense. */
    out->shards_keys |= shards_keys || geometry->heads.key == geometry->heads.query;
}

static int64_t
fused_size(const tp_geometry *geometry)
{
    return (geometry->heads.query + 2 * geometry->heads.key) * geometry->head_size;
}

/* A fused q|k|v: three pieces, or groups of [query heads, key, value]. With one
 * key/value head both orders are the same. */
static void
add_fused(const tp_geometry *geometry, bool interleaved, int64_t size, tp_pieces *out)
{
    const int64_t head = geometry->head_size;
    const tp_heads heads = geometry->heads;
    if (interleaved && heads.key > 1) {
        const int64_t group = heads.query / heads.key + 2;
        add_piece(out, size, group * head, TP_PIECE_UNITS);
        out->heads = (tp_heads){0, 0};
        return;
    }
    add_piece(out, heads.query * head, head, TP_PIECE_QUERY);
    add_piece(out, heads.key * head, head, TP_PIECE_KEY);
    add_piece(out, heads.key * head, head, TP_PIECE_KEY);
}

/* The role of a piece that is as large as all query or all key/value heads. */
static bool
add_heads(const tp_geometry *geometry, int attention, int64_t size, tp_pieces *out)
{
    const int64_t head = geometry->head_size;
    const bool query = size == geometry->heads.query * head;
    if (!query && size != geometry->heads.key * head)
        return false;
    mark_heads(out, geometry, attention, !query);
    add_piece(out, size, head, query ? TP_PIECE_QUERY : TP_PIECE_KEY);
    return true;
}

/* A piece of some of the heads, of which each rank gets as many. */
static bool
add_some_heads(const tp_geometry *geometry, int attention, int64_t size, tp_pieces *out)
{
    if (size % geometry->head_size != 0)
        return false;
    mark_heads(out, geometry, attention, true);
    out->heads = (tp_heads){0, 0};
    add_piece(out, size, geometry->head_size, TP_PIECE_UNITS);
    return true;
}

static int
refuse_thirds(const tp_geometry *geometry, const tp_view *view, tp_error *err)
{
    const long long head = geometry->head_size;
    const long long query = geometry->heads.query, key = geometry->heads.key;
    return tp_fail(err, TP_VALUE,
                   "shape splits a fused q|k|v of size %lld in three equal pieces, but "
                   "its attention has %lld query and %lld key/value heads of %lld; "
                   "leave shape out, or list the pieces: [%lld, %lld, %lld]",
                   (long long)view->size, query, key, head, query * head, key * head,
                   key * head);
}

/* A fused q|k|v of groups, one for each key/value head, that the specification names:
 * shape [groups, features of a group, ...], sharded along the first. */
static bool
add_groups(const tp_geometry *geometry, int attention, const tp_spec *spec,
           const tp_view *view, tp_pieces *out)
{
    const tp_heads heads = geometry->heads;
    const int64_t group = (heads.query / heads.key + 2) * geometry->head_size;
    const tp_shape *shape = &spec->shape;
    const bool inferred = shape->dims == 3 && shape->sizes[1] == -1 &&
                          view->inner == group * shape->sizes[2];
    if (spec->partition != TP_PARTITION_COLUMN || shape->dims < 2 || view->dim != 0 ||
        view->size != heads.key || (shape->sizes[1] != group && !inferred))
        return false;
    mark_heads(out, geometry, attention, true);
    out->heads = (tp_heads){0, 0};
    add_piece(out, view->size, 1, TP_PIECE_UNITS);
    return true;
}

/* One piece that the specification does not divide, inside an attention module. */
static bool
add_undivided(const tp_build *build, int module, int attention, const tp_spec *spec,
              const tp_view *view, tp_pieces *out)
{
    const tp_geometry *geometry = tp_geometries_at(build->geometries, attention);
    const int64_t size = view->size;
    if (add_heads(geometry, attention, size, out))
        return true;
    if (spec->shape.dims > 0)
        return add_groups(geometry, attention, spec, view, out);
    if (spec->partition == TP_PARTITION_COLUMN && !geometry->separate_keys &&
        size == fused_size(geometry)) {
        const char *name = tp_model_module(build->model, module)->name;
        char room[TP_LONGEST_NAME];
        tp_adapted part;
        const char *leaf = tp_names_leaf(tp_adapters_plain(name, room, &part));
        const char *type = tp_model_get_facts(build->model)->model_type;
        mark_heads(out, geometry, attention, true);
        add_fused(geometry, tp_geometry_interleaved(type, leaf), size, out);
        return true;
    }
    /* Some heads are longer than head_size says: with a gate beside each query
     * head, or with a part for positions. Whatever is there once for each query
     * head has to follow it. */
    const int64_t query = geometry->heads.query;
    if (size % query != 0 || (query < build->options->ranks && !geometry->latent))
        return false;
    mark_heads(out, geometry, attention, false);
    add_piece(out, size, size / query, TP_PIECE_QUERY);
    return true;
}

int
tp_pieces_make(const tp_build *build, int module, const tp_spec *spec,
               const tp_view *view, tp_pieces *out, tp_error *err)
{
    out->count = 0;
    out->heads = (tp_heads){0, 0};
    out->attention = -1;
    out->shards_keys = false;

    /* What is full again at once may be sharded anywhere. */
    const bool local = !spec->gather_output && !spec->split_input;
    const bool given = build->attentions[module] != TP_ATTENTION_NEAR;
    const int near = given ? build->attentions[module]
                           : tp_geometries_find(build->geometries, module);
    const bool embeds =
        tp_model_module(build->model, module)->kind == TP_MODULE_EMBEDDING;
    const int attention = local && (given || !embeds) ? near : -1;
    const tp_geometry *geometry = tp_geometries_at(build->geometries, attention);
    if (geometry != NULL && view->count == 1 &&
        add_undivided(build, module, attention, spec, view, out))
        return 0;
    if (geometry != NULL && view->count == 3 && spec->shape.pieces == 0 &&
        view->size == fused_size(geometry) &&
        geometry->heads.key != geometry->heads.query)
        return refuse_thirds(geometry, view, err);
    for (int i = 0; i < view->count; i++) {
        if (geometry == NULL ||
            (!add_heads(geometry, attention, view->piece[i], out) &&
             !(given && add_some_heads(geometry, attention, view->piece[i], out))))
            add_piece(out, view->piece[i], unit_of(build, view->piece[i], false),
                      TP_PIECE_PLAIN);
    }
    return 0;
}

/* Names of a parameter that holds two features beside each other, which one rank needs
 * both: a gate and what it gates. */
static const char *const paired_names[] = {"gate_up", "gate_and_up", "gateup", "w13"};

bool
tp_pieces_paired(const char *leaf)
{
    for (size_t i = 0; i < sizeof(paired_names) / sizeof(paired_names[0]); i++) {
        if (strncmp(leaf, paired_names[i], strlen(paired_names[i])) == 0)
            return true;
    }
    return false;
}

/* Pairs of features that take turns: as the features themselves, twice as long. */
static void
add_pairs(const tp_build *build, int64_t size, bool experts, tp_pieces *out)
{
    const int ranks = build->options->ranks;
    const int64_t unit =
        tp_split_fit(size / 2, unit_of(build, size / 2, experts), ranks);
    add_piece(out, size, 2 * unit, size / 2 < ranks ? TP_PIECE_UNITS : TP_PIECE_PLAIN);
}

void
tp_pieces_raw(const tp_build *build, const tp_parameter *parameter, int attention,
              const tp_view *view, bool experts, tp_pieces *out)
{
    const tp_geometry *geometry = tp_geometries_at(build->geometries, attention);
    *out = (tp_pieces){.attention = -1};
    if (geometry != NULL && view->count == 1 &&
        add_heads(geometry, attention, view->size, out))
        return;
    if (geometry != NULL && view->count == 1 &&
        view->size % geometry->heads.query == 0) {
        mark_heads(out, geometry, attention, false);
        add_piece(out, view->size, view->size / geometry->heads.query, TP_PIECE_QUERY);
        return;
    }
    /* In one piece gate and up can only take turns, unless the view parts them. */
    if (view->count == 1 && view->size % 2 == 0 &&
        view->size == parameter->shape[view->dim] &&
        tp_pieces_paired(parameter->leaf)) {
        add_pairs(build, view->size, experts, out);
        return;
    }
    for (int i = 0; i < view->count; i++)
        add_piece(out, view->piece[i], unit_of(build, view->piece[i], experts),
                  TP_PIECE_PLAIN);
}
