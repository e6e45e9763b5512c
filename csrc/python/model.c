/* SPDX-License-Identifier: Apache-2.0 */
/* model.c -- the type Model: names, shapes and integers of a model. */
#include "python/model.h"

#include "python/args.h"

typedef struct {
    PyObject_HEAD tp_model *model; /* owned, sealed */
} py_model;

const tp_model *
py_model_get(PyObject *model)
{
    return ((py_model *)model)->model;
}

static PyObject *
model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {
        "modules",         "parameters",  "model_type",   "prefix", "integers",
        "input_embedding", "output_head", "takes_labels", NULL};
    py_model_arguments given = {0};
    tp_error err = TP_NO_ERROR;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "OO|$OOOOOO:Model", (char **)names, &given.modules,
            &given.parameters, &given.model_type, &given.prefix, &given.integers,
            &given.input_embedding, &given.output_head, &given.takes_labels))
        return NULL;
    PyObject *self = PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    py_model *model = (py_model *)self;
    if (tp_model_new(&model->model, &err) < 0) {
        py_raise(&err);
        goto failed;
    }
    if (py_model_read(&given, model->model) < 0)
        goto failed;
    return self;
failed:
    Py_DECREF(self);
    return NULL;
}

static void
model_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    tp_model_free(((py_model *)self)->model);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyType_Slot slots[] = {
    {Py_tp_doc,
     (void
          *)"Model(modules, parameters, *, model_type=None, prefix='', integers=..., "
            "input_embedding=-1, output_head=-1, takes_labels=False)\n--\n\n"
            "Names, shapes and integers of a model.\n\n"
            "modules: (name, class name, kind, integers); kind is \"linear\", "
            "\"conv1d\",\n\"embedding\" or \"other\"; parents come before children and "
            "the first is (\"\", ...).\n"
            "parameters: (name, leaf, module index, shape, dtype, itemsize, index of "
            "the\nfirst name of the same tensor or -1)."},
    {Py_tp_new, PY_SLOT(model_new)},
    {Py_tp_dealloc, PY_SLOT(model_dealloc)},
    {0, NULL},
};

const PyType_Spec py_model_spec = {
    .name = "deepspeed_autotp._core.Model",
    .basicsize = sizeof(py_model),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
