/* SPDX-License-Identifier: Apache-2.0 */
/* stack.c -- the type Stack: layers between which the tokens are sharded. */
#include "python/args.h"

#include <stddef.h>

#include "python/holder.h"

static const tp_stack *
get(PyObject *self)
{
    return tp_plan_stack(py_view_plan(self), ((py_view *)self)->index);
}

static PyObject *
name_of(PyObject *self, int module)
{
    return PyUnicode_FromString(tp_model_module(py_view_model(self), module)->name);
}

static PyObject *
stack_get_owner(PyObject *self, void *closure)
{
    (void)closure;
    return name_of(self, get(self)->owner);
}

/* `closure` is the offset of the list in a tp_stack. */
static PyObject *
stack_get_modules(PyObject *self, void *closure)
{
    const tp_modules *modules =
        (const tp_modules *)((const char *)get(self) + (size_t)(uintptr_t)closure);
    return py_module_names(py_view_model(self), modules);
}

static PyObject *
stack_get_token_arguments(PyObject *self, void *closure)
{
    (void)closure;
    const tp_stack *stack = get(self);
    PyObject *names = PyTuple_New(stack->token_argument_count);
    for (int i = 0; names != NULL && i < stack->token_argument_count; i++) {
        PyObject *name = PyUnicode_FromString(stack->token_arguments[i]);
        if (name == NULL || PyTuple_SetItem(names, i, name) < 0) /* steals name */
            Py_CLEAR(names);
    }
    return names;
}

static PyObject *
stack_get_streams_first(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(get(self)->streams_first);
}

static PyObject *
stack_repr(PyObject *self)
{
    PyObject *owner = name_of(self, get(self)->owner);
    PyObject *repr = owner == NULL
                         ? NULL
                         : PyUnicode_FromFormat("<Stack of %d layers in %R>",
                                                get(self)->layers.count, owner);
    Py_XDECREF(owner);
    return repr;
}

#define OFFSET(list) ((void *)(uintptr_t)offsetof(tp_stack, list))

static PyGetSetDef getters[] = {
    {"owner", stack_get_owner, NULL, "Name of the module that runs the layers.", NULL},
    {"layers", stack_get_modules, NULL, "Names of the layers, in order.",
     OFFSET(layers)},
    {"gather_input", stack_get_modules, NULL, "Modules that gather all tokens first.",
     OFFSET(gather_input)},
    {"reduce_scatter_output", stack_get_modules, NULL,
     "Row layers that give each rank the sum for its own tokens.",
     OFFSET(reduce_scatter_output)},
    {"norms", stack_get_modules, NULL,
     "Norms of the owner behind the layers, which take tokens one by one.",
     OFFSET(norms)},
    {"gather_scatter", stack_get_modules, NULL,
     "Modules that gather all tokens first and shard them again behind.",
     OFFSET(gather_scatter)},
    {"token_arguments", stack_get_token_arguments, NULL,
     "Arguments of the layers, beside the first, that have a value for each token.",
     NULL},
    {"streams_first", stack_get_streams_first, NULL,
     "Whether layers are given [streams, batch, sequence, features].", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)"Layers between which the tokens are sharded; read-only."},
    {Py_tp_dealloc, PY_SLOT(py_view_dealloc)},
    {Py_tp_repr, PY_SLOT(stack_repr)},
    {Py_tp_getset, getters},
    {0, NULL},
};

const PyType_Spec py_stack_spec = {
    .name = "deepspeed_autotp._core.Stack",
    .basicsize = sizeof(py_view),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
