/* SPDX-License-Identifier: Apache-2.0 */
/* enums.h -- the kinds and sources of a plan as Python enums. */
#ifndef PY_ENUMS_H
#define PY_ENUMS_H

#include "python/module.h"

#include "core/plan/plan.h"

/* Make Kind and Source, both enum.StrEnum, and add them to the module and its state. */
int py_enums_add(PyObject *module, py_state *state);

/* The member; new. */
PyObject *py_kind(const py_state *state, tp_kind kind);
PyObject *py_source(const py_state *state, tp_source source);

/* The names in the module, for __all__; NULL-terminated. */
extern const char *const py_enum_names[];

#endif
