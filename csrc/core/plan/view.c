/* SPDX-License-Identifier: Apache-2.0 */
/* view.c -- a weight as [outer, size, inner] around the sharded dimension, and its
 * pieces. */
#include "plan/view.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "base/text.h"

static int64_t
product(const int64_t *sizes, int first, int end)
{
    int64_t result = 1;
    for (int i = first; i < end; i++)
        result *= sizes[i];
    return result;
}

void
tp_view_sizes(const int64_t *sizes, int dims, char *out)
{
    size_t used = (size_t)snprintf(out, TP_VIEW_SIZES, "[");
    for (int i = 0; i < dims; i++)
        used += (size_t)snprintf(out + used, TP_VIEW_SIZES - used,
                                 i > 0 ? ", %lld" : "%lld", (long long)sizes[i]);
    snprintf(out + used, TP_VIEW_SIZES - used, "]");
}

static void
one_piece(const int64_t *sizes, int dims, int along, int dim, tp_view *out)
{
    out->dim = dim;
    out->outer = product(sizes, 0, along);
    out->size = sizes[along];
    out->inner = product(sizes, along + 1, dims);
    out->count = 1;
    out->piece[0] = out->size;
}

/* A list adds up without overflow: tp_spec_check has seen to it. */
static int64_t
listed_size(const tp_shape *shape)
{
    int64_t sum = 0;
    for (int i = 0; i < shape->pieces; i++)
        sum += shape->piece[i];
    return sum;
}

/* Replace the one piece by those that the specification lists. */
static int
list_pieces(const tp_shape *shape, tp_view *out, tp_error *err)
{
    const int64_t sum = listed_size(shape);
    for (int i = 0; i < shape->pieces; i++)
        out->piece[i] = shape->piece[i];
    out->count = shape->pieces;
    if (sum == out->size)
        return 0;

    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "the pieces ");
    for (int i = 0; i < shape->pieces; i++)
        tp_text_add(&text, i > 0 ? " + %lld" : "%lld", (long long)shape->piece[i]);
    tp_text_add(&text,
                " of shape are %lld in all, but the sharded dimension has %lld; list "
                "pieces that add up to it",
                (long long)sum, (long long)out->size);
    return tp_text_fail(&text, TP_VALUE, err);
}

static int
equal_pieces(int64_t count, tp_view *out, tp_error *err)
{
    if (count > TP_MAX_PIECES)
        return tp_fail(
            err, TP_VALUE,
            "shape asks for %lld equal pieces along the sharded dimension, but at most "
            "%d are supported; write -1 there if it is one piece",
            (long long)count, TP_MAX_PIECES);
    if (out->size % count != 0)
        return tp_fail(
            err, TP_VALUE,
            "shape asks for %lld equal pieces, which do not divide size %lld; "
            "list the size of each piece instead",
            (long long)count, (long long)out->size);
    out->count = (int)count;
    for (int i = 0; i < out->count; i++)
        out->piece[i] = out->size / count;
    return 0;
}

static int
fail_dim(const tp_spec *spec, int dim, tp_error *err)
{
    return tp_fail(
        err, TP_VALUE,
        "partition_dim %d does not go with partition_type '%s', which shards dimension "
        "%d of this weight; leave partition_dim out, or change one of the two",
        spec->dim, tp_partition_name(spec->partition), dim);
}

/* A shape of the weight's own rank: sizes[dim] counts or lists the pieces. */
static int
view_same_rank(const tp_spec *spec, const tp_parameter *weight, int dim, tp_view *out,
               tp_error *err)
{
    const tp_shape *shape = &spec->shape;
    for (int i = 0; i < shape->dims; i++) {
        const bool listed = shape->pieces > 0 && shape->sizes[i] == 0;
        if (i == dim ? shape->pieces > 0 && !listed : listed)
            return tp_fail(err, TP_VALUE,
                           "shape lists its pieces along another dimension than %d, "
                           "which is the one that partition_type '%s' shards here",
                           dim, tp_partition_name(spec->partition));
        if (i != dim && shape->sizes[i] > 0 && shape->sizes[i] != weight->shape[i])
            return tp_fail(err, TP_VALUE,
                           "shape[%d] is %lld, but the weight has %lld there; write -1 "
                           "or the size itself",
                           i, (long long)shape->sizes[i], (long long)weight->shape[i]);
    }
    one_piece(weight->shape, weight->dims, dim, dim, out);
    if (shape->pieces > 0)
        return list_pieces(shape, out, err);
    return shape->sizes[dim] > 0 ? equal_pieces(shape->sizes[dim], out, err) : 0;
}

/* The sizes of a view of higher rank, with -1 inferred and a list summed. */
static int
infer_sizes(const tp_shape *shape, const tp_parameter *weight, int64_t *sizes,
            tp_error *err)
{
    const int64_t numel = product(weight->shape, 0, weight->dims);
    int64_t known = 1;
    int unknown = -1;
    for (int i = 0; i < shape->dims; i++) {
        sizes[i] = shape->sizes[i] != 0 ? shape->sizes[i] : listed_size(shape);
        if (sizes[i] == -1) {
            if (unknown >= 0)
                return tp_fail(err, TP_VALUE,
                               "shape[%d] and shape[%d] are both -1; only one size can "
                               "be inferred",
                               unknown, i);
            unknown = i;
        } else if (__builtin_mul_overflow(known, sizes[i], &known)) {
            known = 0;
        }
    }
    if (unknown >= 0 && known > 0 && numel % known == 0) {
        sizes[unknown] = numel / known;
        return 0;
    }
    if (unknown < 0 && known == numel)
        return 0;
    char wanted[TP_VIEW_SIZES];
    tp_view_sizes(sizes, shape->dims, wanted);
    return tp_fail(err, TP_VALUE, "a weight of %lld elements cannot be seen as %s",
                   (long long)numel, wanted);
}

/* The weight's dimension that view dimension `along` is a part of, or -1 where the
 * view does not split dimensions of the weight but runs across them. */
static int
refined_dim(const tp_parameter *weight, const int64_t *sizes, int dims, int along)
{
    int at = 0;
    int found = -1;
    for (int dim = 0; dim < weight->dims; dim++) {
        const bool last = dim == weight->dims - 1;
        const int first = at;
        int64_t covered = 1;
        while (at < dims && (covered < weight->shape[dim] || (last && sizes[at] == 1)))
            covered *= sizes[at++];
        if (covered != weight->shape[dim])
            return -1;
        if (along >= first && along < at)
            found = dim;
    }
    return found;
}

/* A shape of higher rank: a view, of which one dimension is sharded. */
static int
view_higher_rank(const tp_spec *spec, const tp_parameter *weight, int dim, tp_view *out,
                 tp_error *err)
{
    const tp_shape *shape = &spec->shape;
    int64_t sizes[TP_MAX_DIMS];
    if (spec->dim < 0)
        return tp_fail(err, TP_VALUE,
                       "shape has %d dimensions and the weight %d, so partition_dim "
                       "has to say which dimension of shape is sharded",
                       shape->dims, weight->dims);
    if (infer_sizes(shape, weight, sizes, err) < 0)
        return -1;

    char wanted[TP_VIEW_SIZES];
    tp_view_sizes(sizes, shape->dims, wanted);
    const int refined = refined_dim(weight, sizes, shape->dims, spec->dim);
    if (refined < 0)
        return tp_fail(err, TP_VALUE,
                       "shape %s runs across the dimensions of the weight, so a shard "
                       "would not be a matrix; split each dimension separately, the "
                       "last size being the last of the weight",
                       wanted);
    if (refined != dim)
        return tp_fail(err, TP_VALUE,
                       "dimension %d of shape %s is a part of dimension %d of the "
                       "weight, but partition_type '%s' shards dimension %d",
                       spec->dim, wanted, refined, tp_partition_name(spec->partition),
                       dim);
    one_piece(sizes, shape->dims, spec->dim, dim, out);
    return shape->pieces > 0 ? list_pieces(shape, out, err) : 0;
}

int
tp_view_weight(const tp_spec *spec, const tp_parameter *weight, int dim, tp_view *out,
               tp_error *err)
{
    const tp_shape *shape = &spec->shape;
    if (shape->dims > weight->dims)
        return view_higher_rank(spec, weight, dim, out, err);
    if (spec->dim >= 0 && spec->dim != dim)
        return fail_dim(spec, dim, err);
    if (shape->dims == weight->dims)
        return view_same_rank(spec, weight, dim, out, err);
    if (shape->dims > 0)
        return tp_fail(err, TP_VALUE,
                       "shape has %d dimensions, but the weight has %d; give at least "
                       "as many",
                       shape->dims, weight->dims);
    one_piece(weight->shape, weight->dims, dim, dim, out);
    return 0;
}

void
tp_view_bias(const tp_parameter *weight, int dim, int64_t *outer, int64_t *inner)
{
    *outer /= product(weight->shape, 0, dim);
    *inner /= product(weight->shape, dim + 1, weight->dims);
}
