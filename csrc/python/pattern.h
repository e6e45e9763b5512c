/* SPDX-License-Identifier: Apache-2.0 */
/* pattern.h -- regular expressions that Python has accepted. */
#ifndef PY_PATTERN_H
#define PY_PATTERN_H

#include "python/module.h"

#include "core/rules/regex.h"

/* Compile with re.compile first, which decides what is valid, and keep the bound
 * method `match` of its result as the fallback. ValueError naming pattern and
 * position, TypeError starting with `what` when `pattern` is no str. The caller
 * frees `out`. */
int py_regex_new(py_state *state, PyObject *pattern, const char *what, tp_regex **out);

#endif
