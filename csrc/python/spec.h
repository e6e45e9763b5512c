/* SPDX-License-Identifier: Apache-2.0 */
/* spec.h -- the dict form of a specification.
 *
 * Keys: partition_type, partition_dim, shape, gather_output, split_input,
 * sum_gradient. */
#ifndef PY_SPEC_H
#define PY_SPEC_H

#include "python/module.h"

#include "core/rules/spec.h"

/* Read a mapping and check it. Missing keys take their default; an unknown key
 * is a ValueError with the nearest keys. Messages start with `where`. */
int py_spec_read(PyObject *mapping, const char *where, tp_spec *out);

/* A new dict with every key, or NULL. Missing values are None, shape is a tuple. */
PyObject *py_spec_dict(const tp_spec *spec);

#endif
