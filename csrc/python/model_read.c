/* SPDX-License-Identifier: Apache-2.0 */
/* model_read.c -- a model from two sequences of tuples.
 *
 * A model has tens of thousands of parameters, so items are read in place and a
 * message is put together only once something is wrong. */
#include "python/module.h"

#include <string.h>

#include "core/base/did_you_mean.h"
#include "python/args.h"
#include "python/model.h"

/* Room for the integers of one module, used again for the next. */
typedef struct {
    tp_integer *items; /* owned; keys are borrowed from a dict */
    Py_ssize_t room;
} integers;

static int
reserve(integers *list, Py_ssize_t count)
{
    if (count <= list->room)
        return 0;
    tp_integer *items =
        PyMem_Realloc(list->items, (size_t)count * 2 * sizeof(*list->items));
    if (items == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    list->items = items;
    list->room = count * 2;
    return 0;
}

/* `dict` must stay alive until the integers have been copied. */
static int
read_integers(PyObject *dict, integers *list, int *count)
{
    Py_ssize_t position = 0;
    PyObject *key = NULL, *value = NULL; /* borrowed */
    *count = 0;
    if (reserve(list, PyDict_Size(dict)) < 0)
        return -1;
    while (PyDict_Next(dict, &position, &key, &value)) {
        tp_integer *item = &list->items[(*count)++];
        if (py_read_text(key, "integers: key", &item->key) < 0)
            return -1;
        if (py_read_int64(value, item->key, &item->value) < 0)
            return py_raised_at("integers");
    }
    return 0;
}

static int
read_kind(PyObject *object, tp_module_kind *out)
{
    static const char *const kinds[] = {
        [TP_MODULE_OTHER] = "other",     [TP_MODULE_LINEAR] = "linear",
        [TP_MODULE_CONV1D] = "conv1d",   [TP_MODULE_EMBEDDING] = "embedding",
        [TP_MODULE_EXPERTS] = "experts", [TP_MODULE_EXPERT_BLOCKS] = "expert blocks",
    };
    const int count = sizeof(kinds) / sizeof(kinds[0]);
    const char *name = NULL;
    if (py_read_text(object, "kind", &name) < 0)
        return -1;
    for (int i = 0; i < count; i++) {
        if (strcmp(name, kinds[i]) == 0) {
            *out = (tp_module_kind)i;
            return 0;
        }
    }
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "unknown kind '%s'", name);
    tp_did_you_mean_add(&text, name, kinds, count);
    tp_text_fail(&text, TP_VALUE, &err);
    py_raise(&err);
    return -1;
}

static int
add_module(PyObject *item, integers *list, tp_model *model)
{
    tp_module module = {0};
    tp_error err = TP_NO_ERROR;
    int index = 0;
    if (py_check_tuple(item, NULL, 4, "a tuple (name, class name, kind, integers)") <
            0 ||
        py_read_text(PyTuple_GetItem(item, 0), "name", &module.name) < 0 ||
        py_read_text(PyTuple_GetItem(item, 1), "class name", &module.class_name) < 0 ||
        read_kind(PyTuple_GetItem(item, 2), &module.kind) < 0)
        return -1;
    PyObject *dict = py_read_mapping(PyTuple_GetItem(item, 3), "integers");
    if (dict == NULL)
        return -1;
    int result = read_integers(dict, list, &module.integer_count);
    module.integers = list->items;
    if (result == 0 && tp_model_add_module(model, &module, &index, &err) < 0) {
        py_raise(&err);
        result = -1;
    }
    Py_DECREF(dict);
    return result;
}

static int
read_shape(PyObject *object, tp_parameter *parameter)
{
    int result = 0;
    PyObject *sizes = py_read_sequence(object, "shape");
    if (sizes == NULL)
        return -1;
    const Py_ssize_t dims = PyTuple_Size(sizes);
    if (dims > TP_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError,
                     "shape: has %zd dimensions, but at most %d are supported", dims,
                     TP_MAX_DIMS);
        result = -1;
    }
    for (Py_ssize_t i = 0; result == 0 && i < dims; i++)
        if (py_read_int64(PyTuple_GetItem(sizes, i), NULL, &parameter->shape[i]) < 0)
            result = py_raised_at("shape[%zd]", i);
    parameter->dims = (int)dims;
    Py_DECREF(sizes);
    return result;
}

static int
add_parameter(PyObject *item, tp_model *model)
{
    tp_parameter parameter = {0};
    tp_error err = TP_NO_ERROR;
    int index = 0;
    if (py_check_tuple(item, NULL, 7,
                       "a tuple (name, leaf, module index, shape, dtype, itemsize, "
                       "tied to)") < 0 ||
        py_read_text(PyTuple_GetItem(item, 0), "name", &parameter.name) < 0 ||
        py_read_text(PyTuple_GetItem(item, 1), "leaf", &parameter.leaf) < 0 ||
        py_read_int(PyTuple_GetItem(item, 2), "module index", &parameter.module) < 0 ||
        read_shape(PyTuple_GetItem(item, 3), &parameter) < 0 ||
        py_read_text(PyTuple_GetItem(item, 4), "dtype", &parameter.dtype) < 0 ||
        py_read_int(PyTuple_GetItem(item, 5), "itemsize", &parameter.itemsize) < 0 ||
        py_read_int(PyTuple_GetItem(item, 6), "tied to", &parameter.tied_to) < 0)
        return -1;
    if (parameter.itemsize < 1) {
        PyErr_Format(PyExc_ValueError, "itemsize: %d bytes", parameter.itemsize);
        return -1;
    }
    if (tp_model_add_parameter(model, &parameter, &index, &err) < 0) {
        py_raise(&err);
        return -1;
    }
    return 0;
}

static int
read_modules(PyObject *object, integers *list, tp_model *model)
{
    int result = 0;
    PyObject *items = py_read_sequence(object, "modules");
    const Py_ssize_t count = items == NULL ? -1 : PyTuple_Size(items);
    for (Py_ssize_t i = 0; result == 0 && i < count; i++)
        if (add_module(PyTuple_GetItem(items, i), list, model) < 0)
            result = py_raised_at("modules[%zd]", i);
    Py_XDECREF(items);
    return count < 0 ? -1 : result;
}

static int
read_parameters(PyObject *object, tp_model *model)
{
    int result = 0;
    PyObject *items = py_read_sequence(object, "parameters");
    const Py_ssize_t count = items == NULL ? -1 : PyTuple_Size(items);
    for (Py_ssize_t i = 0; result == 0 && i < count; i++)
        if (add_parameter(PyTuple_GetItem(items, i), model) < 0)
            result = py_raised_at("parameters[%zd]", i);
    Py_XDECREF(items);
    return count < 0 ? -1 : result;
}

static int
read_facts(const py_model_arguments *given, integers *list, tp_model *model)
{
    tp_model_facts facts = {.prefix = "", .input_embedding = -1, .output_head = -1};
    tp_error err = TP_NO_ERROR;
    PyObject *dict = NULL;
    int result = -1;
    if (py_read_optional_text(given->model_type, "model_type", &facts.model_type) < 0 ||
        py_read_int(given->input_embedding, "input_embedding", &facts.input_embedding) <
            0 ||
        py_read_int(given->output_head, "output_head", &facts.output_head) < 0 ||
        py_read_flag(given->takes_labels, "takes_labels", &facts.takes_labels) < 0)
        return -1;
    if (given->prefix != NULL &&
        py_read_text(given->prefix, "prefix", &facts.prefix) < 0)
        return -1;
    if (given->integers != NULL) {
        dict = py_read_mapping(given->integers, "integers");
        if (dict == NULL || read_integers(dict, list, &facts.integer_count) < 0)
            goto done;
    }
    facts.integers = list->items;
    result = tp_model_seal(model, &facts, &err);
    if (result < 0)
        py_raise(&err);
done:
    Py_XDECREF(dict);
    return result;
}

int
py_model_read(const py_model_arguments *given, tp_model *model)
{
    integers list = {NULL, 0};
    int result = read_modules(given->modules, &list, model);
    if (result == 0)
        result = read_parameters(given->parameters, model);
    if (result == 0)
        result = read_facts(given, &list, model);
    PyMem_Free(list.items);
    return result;
}
