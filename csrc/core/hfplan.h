/* SPDX-License-Identifier: Apache-2.0 */
/* hfplan.h -- the tensor-parallel plans of transformers.
 *
 * Translates a style to a specification and matches the names of a plan,
 * where `*` stands for one index between dots and nothing else. */
#ifndef TP_HFPLAN_H
#define TP_HFPLAN_H

#include <stdbool.h>

#include "error.h"
#include "spec.h"

/* The specification behind a style name, old or new, in any case. Fails with
 * TP_VALUE naming pattern, style and the nearest styles; a style that is known but
 * not built yet fails with its own message. */
int tp_hfplan_spec(const char *style, const char *pattern, tp_spec *out, tp_error *err);

/* Whether `name` is `pattern`, or `prefix.pattern` when `prefix` is not empty,
 * or `pattern` begins with `prefix.` and `name` is the rest. */
bool tp_hfplan_match(const char *pattern, const char *prefix, const char *name);

#endif
