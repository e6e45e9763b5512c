/* SPDX-License-Identifier: Apache-2.0 */
/* rule.h -- one rule from Python values. */
#ifndef PY_RULE_H
#define PY_RULE_H

#include "python/module.h"

#include "core/rules/rule.h"

/* Borrowed; model_types and source are NULL when they were not given. */
typedef struct {
    PyObject *patterns, *spec, *label, *model_types, *source;
} py_rule_arguments;

/* Fill `rule`, which the caller hands to tp_rules_add or clears. Messages about
 * the content of the rule start with its label. */
int py_rule_build(py_state *state, const py_rule_arguments *given, tp_rule *rule);

#endif
