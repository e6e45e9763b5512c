/* SPDX-License-Identifier: Apache-2.0 */
/* holder.c -- a plan's C value with what it borrows from, and objects into it. */
#include "python/holder.h"

#include "core/passes/passes.h"

#include "python/args.h"
#include "python/rules.h"

PyObject *
py_holder_new(py_state *state, PyObject *model, PyObject *rules,
              const tp_plan_options *options)
{
    tp_error err = TP_NO_ERROR;
    PyObject *self = PyType_GenericAlloc(state->types[PY_HOLDER], 0);
    if (self == NULL)
        return NULL;
    py_holder *holder = (py_holder *)self;
    holder->model = Py_NewRef(model);
    holder->rules = Py_NewRef(rules);
    const int result = tp_plan_new(py_model_get(model), py_rules_hold(rules), options,
                                   &holder->plan, &err);
    py_rules_release(rules);
    if (result < 0) {
        py_raise(&err);
        Py_CLEAR(self);
    }
    return self;
}

static void
holder_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    py_holder *holder = (py_holder *)self;
    tp_plan_free(holder->plan);
    Py_XDECREF(holder->model);
    Py_XDECREF(holder->rules);
    PyObject_Free(self);
    Py_DECREF(type);
}

PyObject *
py_view_new(py_state *state, py_type which, PyObject *holder, int index)
{
    PyObject *self = PyType_GenericAlloc(state->types[which], 0);
    if (self == NULL)
        return NULL;
    py_view *view = (py_view *)self;
    view->holder = Py_NewRef(holder);
    view->index = index;
    return self;
}

PyObject *
py_view_tuple(py_state *state, py_type which, PyObject *holder, int count)
{
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i, py_view_new(state, which, holder, i));
    return tuple;
}

void
py_view_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(((py_view *)self)->holder);
    PyObject_Free(self);
    Py_DECREF(type);
}

PyObject *
py_module_names(const tp_model *model, const tp_modules *modules)
{
    PyObject *tuple = PyTuple_New(modules->count);
    for (int i = 0; tuple != NULL && i < modules->count; i++)
        py_tuple_put(
            &tuple, i,
            PyUnicode_FromString(tp_model_module(model, modules->items[i])->name));
    return tuple;
}

const tp_plan *
py_view_plan(PyObject *self)
{
    return ((py_holder *)((py_view *)self)->holder)->plan;
}

const tp_model *
py_view_model(PyObject *self)
{
    return py_model_get(((py_holder *)((py_view *)self)->holder)->model);
}

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)"The C value behind a plan; Python code never sees it."},
    {Py_tp_dealloc, PY_SLOT(holder_dealloc)},
    {0, NULL},
};

const PyType_Spec py_holder_spec = {
    .name = "deepspeed_autotp._core.Holder",
    .basicsize = sizeof(py_holder),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

PyObject *
py_runs_tuple(const tp_run *runs, int count)
{
    PyObject *tuple = PyTuple_New(2 * (Py_ssize_t)count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        py_tuple_put(&tuple, 2 * i, PyLong_FromLongLong(runs[i].start));
        if (tuple != NULL)
            py_tuple_put(&tuple, 2 * i + 1, PyLong_FromLongLong(runs[i].length));
    }
    return tuple;
}
