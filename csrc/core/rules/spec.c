/* SPDX-License-Identifier: Apache-2.0 */
/* spec.c -- what a rule asks for, checked without a weight. */
#include "rules/spec.h"

#include "base/did_you_mean.h"

static const char *const partition_names[] = {
    [TP_PARTITION_COLUMN] = "column",
    [TP_PARTITION_ROW] = "row",
    [TP_PARTITION_SKIP] = "skip",
};

enum { PARTITION_COUNT = sizeof(partition_names) / sizeof(partition_names[0]) };

int
tp_partition_parse(const char *name, const char *where, tp_partition *out,
                   tp_error *err)
{
    for (int i = 0; i < PARTITION_COUNT; i++) {
        if (tp_text_same(name, partition_names[i])) {
            *out = (tp_partition)i;
            return 0;
        }
    }
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "%s: unknown partition type '%s'", where, name);
    tp_did_you_mean_add(&text, name, partition_names, PARTITION_COUNT);
    return tp_text_fail(&text, TP_VALUE, err);
}

const char *
tp_partition_name(tp_partition partition)
{
    return partition_names[partition];
}

static int
check_flags(const tp_spec *spec, const char *where, tp_error *err)
{
    const struct {
        bool set;
        const char *name;
        tp_partition needs;
    } flags[] = {
        {spec->gather_output, "gather_output", TP_PARTITION_COLUMN},
        {spec->split_input, "split_input", TP_PARTITION_ROW},
        {spec->sum_gradient, "grad_allreduce", TP_PARTITION_SKIP},
    };
    for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
        if (flags[i].set && flags[i].needs != spec->partition)
            return tp_fail(
                err, TP_VALUE,
                "%s: %s needs partition_type '%s', but it is '%s'; remove the "
                "flag or change the type",
                where, flags[i].name, partition_names[flags[i].needs],
                partition_names[spec->partition]);
    }
    return 0;
}

/* A skipped weight is never sharded, so a place to shard it is a mistake. */
static int
check_skip(const tp_spec *spec, const char *where, tp_error *err)
{
    if (spec->dim == -1 && spec->shape.dims == 0)
        return 0;
    return tp_fail(err, TP_VALUE,
                   "%s: partition_type 'skip' replicates the weight, so %s has no "
                   "effect; remove it or choose 'column' or 'row'",
                   where, spec->dim == -1 ? "shape" : "partition_dim");
}

static int
check_dim(const tp_spec *spec, int dim, const char *where, tp_error *err)
{
    const int dims = spec->shape.dims;
    if (dims < 0 || dims > TP_MAX_DIMS)
        return tp_fail(err, TP_VALUE,
                       "%s: shape has %d dimensions, but at most %d are supported",
                       where, dims, TP_MAX_DIMS);
    const int bound = dims > 0 ? dims : TP_MAX_DIMS;
    if (dim >= 0 && dim < bound)
        return 0;
    if (dims == 0)
        return tp_fail(err, TP_VALUE,
                       "%s: partition_dim is %d, but it must be between 0 and %d",
                       where, dim, TP_MAX_DIMS - 1);
    return tp_fail(err, TP_VALUE,
                   "%s: partition_dim is %d, but shape has %d dimension%s, so it must "
                   "be between 0 and %d",
                   where, dim, dims, dims == 1 ? "" : "s", dims - 1);
}

static int
check_pieces(const tp_shape *shape, int dim, const char *where, tp_error *err)
{
    if (shape->pieces < 0 || shape->pieces > TP_MAX_PIECES)
        return tp_fail(err, TP_VALUE,
                       "%s: shape[%d] lists %d pieces, but at most %d are supported",
                       where, dim, shape->pieces, TP_MAX_PIECES);
    int64_t sum = 0;
    for (int i = 0; i < shape->pieces; i++) {
        const int64_t piece = shape->piece[i];
        if (piece <= 0)
            return tp_fail(err, TP_VALUE,
                           "%s: shape[%d][%d] is %lld, but the size of a piece must be "
                           "positive",
                           where, dim, i, (long long)piece);
        if (__builtin_add_overflow(sum, piece, &sum))
            return tp_fail(
                err, TP_VALUE,
                "%s: the pieces of shape[%d] add up to more than a weight can "
                "hold",
                where, dim);
    }
    return 0;
}

static bool
has_list(const tp_shape *shape)
{
    for (int i = 0; i < shape->dims; i++) {
        if (shape->sizes[i] == 0)
            return true;
    }
    return false;
}

static int
check_sizes(const tp_shape *shape, int dim, const char *where, tp_error *err)
{
    for (int i = 0; i < shape->dims; i++) {
        const int64_t size = shape->sizes[i];
        if (size > 0 || size == -1)
            continue;
        if (size != 0 || shape->pieces == 0)
            return tp_fail(
                err, TP_VALUE,
                "%s: shape[%d] is %lld, but a size must be positive, or -1 to "
                "be inferred",
                where, i, (long long)size);
        if (i != dim)
            return tp_fail(err, TP_VALUE,
                           "%s: shape[%d] is a list of pieces, but the weight is "
                           "sharded along dimension %d; a list can stand there only",
                           where, i, dim);
    }
    return 0;
}

int
tp_spec_check(const tp_spec *spec, const char *where, tp_error *err)
{
    if (check_flags(spec, where, err) < 0)
        return -1;
    if (spec->partition == TP_PARTITION_SKIP)
        return check_skip(spec, where, err);

    const int dim = spec->dim != -1 ? spec->dim : spec->partition == TP_PARTITION_ROW;
    if (check_dim(spec, dim, where, err) < 0)
        return -1;
    if (spec->shape.pieces != 0 && !has_list(&spec->shape))
        return tp_fail(err, TP_VALUE, "%s: pieces are listed, but not in shape", where);
    if (check_pieces(&spec->shape, dim, where, err) < 0)
        return -1;
    return check_sizes(&spec->shape, dim, where, err);
}
