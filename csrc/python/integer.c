/* SPDX-License-Identifier: Apache-2.0 */
/* integer.c -- the type LocalInteger: an attribute that differs from the full one. */
#include "python/args.h"
#include "python/holder.h"

static const tp_local_integer *
get(PyObject *self)
{
    return tp_plan_integer(py_view_plan(self), ((py_view *)self)->index);
}

static PyObject *
integer_get_module(PyObject *self, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(
        tp_model_module(py_view_model(self), get(self)->module)->name);
}

static PyObject *
integer_get_key(PyObject *self, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(get(self)->key);
}

static PyObject *
integer_get_full(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLongLong(get(self)->full);
}

static PyObject *
integer_get_values(PyObject *self, void *closure)
{
    (void)closure;
    return py_int_tuple(get(self)->values, tp_plan_ranks(py_view_plan(self)));
}

static PyObject *
integer_repr(PyObject *self)
{
    const tp_local_integer *integer = get(self);
    return PyUnicode_FromFormat(
        "<LocalInteger %s.%s>",
        tp_model_module(py_view_model(self), integer->module)->name, integer->key);
}

static PyGetSetDef getters[] = {
    {"module", integer_get_module, NULL, "Name of the module.", NULL},
    {"key", integer_get_key, NULL, "Name of the attribute.", NULL},
    {"full", integer_get_full, NULL, "Its value in the full model.", NULL},
    {"values", integer_get_values, NULL, "Its value on each rank.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc,
     (void *)"An integer attribute of a module that becomes local; read-only."},
    {Py_tp_dealloc, PY_SLOT(py_view_dealloc)},
    {Py_tp_repr, PY_SLOT(integer_repr)},
    {Py_tp_getset, getters},
    {0, NULL},
};

const PyType_Spec py_integer_spec = {
    .name = "deepspeed_autotp._core.LocalInteger",
    .basicsize = sizeof(py_view),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
