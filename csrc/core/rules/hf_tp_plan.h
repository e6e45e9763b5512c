/* SPDX-License-Identifier: Apache-2.0 */
/* hf_tp_plan.h -- the tensor-parallel plans of transformers.
 *
 * Translates a style to a specification and matches the names of a plan,
 * where `*` stands for one index between dots, or for any text. */
#ifndef TP_HF_TP_PLAN_H
#define TP_HF_TP_PLAN_H

#include <stdbool.h>

#include "base/error.h"
#include "rules/spec.h"

/* What a style speaks of. */
typedef enum {
    TP_STYLE_SHARD,   /* a weight: a specification says how it is sharded */
    TP_STYLE_EXPERTS, /* a module that holds the weights of experts */
    TP_STYLE_SHARE,   /* a module inside of experts that computes nothing */
    TP_STYLE_ROPE,    /* a linear layer that makes a latent and positions */
    TP_STYLE_NOTHING, /* nothing that would have to be done here */
    TP_STYLE_UNKNOWN  /* known to transformers, but not to this package */
} tp_style;

/* What a style name, old or new, in any case, stands for; `spec` is filled for
 * TP_STYLE_SHARD. Fails with TP_VALUE naming pattern, style and the nearest styles. */
int tp_hf_plan_style(const char *style, const char *pattern, tp_style *out,
                     tp_spec *spec, tp_error *err);

/* The name of the style at `index` of the table, or NULL behind the last. */
const char *tp_hf_plan_style_name(int index);

/* As tp_hf_plan_style, for TP_STYLE_SHARD alone: any other style fails. */
int tp_hf_plan_spec(const char *style, const char *pattern, tp_spec *out,
                    tp_error *err);

/* How the `*` of a pattern is read. */
typedef enum {
    TP_STARS_INDICES, /* one index between dots and nothing else, as transformers does
                       */
    TP_STARS_TEXT     /* any text, dots included, as DeepSpeed does */
} tp_stars;

/* Whether `name` is `pattern`, or `prefix.pattern` when `prefix` is not empty,
 * or `pattern` begins with `prefix.` and `name` is the rest. */
bool tp_hf_plan_match(const char *pattern, const char *prefix, const char *name,
                      tp_stars stars);

#endif
