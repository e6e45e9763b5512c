/* SPDX-License-Identifier: Apache-2.0 */
/* holder.h -- a plan's C value with what it borrows from, and objects into it.
 *
 * A Plan keeps a tuple of its entries. Were they to refer to the Plan, each
 * plan would be a cycle; they refer to the holder, as the Plan does. */
#ifndef PY_HOLDER_H
#define PY_HOLDER_H

#include "python/module.h"

#include "core/plan/plan.h"
#include "python/model.h"

typedef struct {
    PyObject_HEAD tp_plan *plan; /* owned */
    PyObject *model;             /* strong: a Model, which the plan borrows */
    PyObject *rules;             /* strong: Rules, which own the labels */
} py_holder;

/* Make a plan. New, or NULL. `model` and `rules` must have those types. */
PyObject *py_holder_new(py_state *state, PyObject *model, PyObject *rules,
                        const tp_plan_options *options);

/* What Entry, Layer and LocalInteger are: one item of a plan. */
typedef struct {
    PyObject_HEAD PyObject *holder; /* strong */
    int index;
} py_view;

/* New; `which` is PY_ENTRY, PY_LAYER or PY_INTEGER. */
PyObject *py_view_new(py_state *state, py_type which, PyObject *holder, int index);

/* A new tuple of the views 0 to count - 1. */
PyObject *py_view_tuple(py_state *state, py_type which, PyObject *holder, int count);

/* tp_dealloc of the three types. */
void py_view_dealloc(PyObject *self);

/* start, length, start, length, ... New, or NULL. */
PyObject *py_runs_tuple(const tp_run *runs, int count);

/* New: the names of the modules, in order. */
PyObject *py_module_names(const tp_model *model, const tp_modules *modules);

const tp_plan *py_view_plan(PyObject *self);
const tp_model *py_view_model(PyObject *self);

#endif
