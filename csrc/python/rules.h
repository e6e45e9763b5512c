/* SPDX-License-Identifier: Apache-2.0 */
/* rules.h -- what a plan needs of the type Rules. */
#ifndef PY_RULES_H
#define PY_RULES_H

#include "python/module.h"

#include "core/rules/rule.h"

/* The rules, for reading; no rule can be added before py_rules_release. A
 * pattern may run Python code while the rules are read. */
const tp_rules *py_rules_hold(PyObject *rules);
void py_rules_release(PyObject *rules);

#endif
