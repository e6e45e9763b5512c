/* SPDX-License-Identifier: Apache-2.0 */
/* spec.c -- the dict form of a specification, both ways.
 *
 * Only what the C form cannot express is checked here: keys, types, list
 * lengths, None. The rest is tp_spec_check's. */
#include "python/spec.h"

#include <string.h>

#include "core/base/did_you_mean.h"
#include "python/args.h"

static int
read_partition(PyObject *value, const char *key, tp_spec *spec)
{
    const char *name = NULL;
    if (py_read_text(value, key, &name) < 0)
        return -1;
    tp_error err = TP_NO_ERROR;
    if (tp_partition_parse(name, key, &spec->partition, &err) < 0) {
        py_raise(&err);
        return -1;
    }
    return 0;
}

static int
read_dim(PyObject *value, const char *key, tp_spec *spec)
{
    spec->dim = -1;
    if (value == Py_None)
        return 0;
    if (py_read_int(value, key, &spec->dim) < 0)
        return -1;
    if (spec->dim >= 0)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "%s: %d is negative; count dimensions from 0, or use None for the "
                 "one that partition_type implies",
                 key, spec->dim);
    return -1;
}

static int
read_pieces(PyObject *list, tp_shape *shape)
{
    int result = -1;
    PyObject *items = py_read_sequence(list, NULL);
    if (items == NULL)
        return -1;
    const Py_ssize_t count = PyTuple_Size(items);
    if (count == 0 || count > TP_MAX_PIECES) {
        PyErr_Format(PyExc_ValueError, "a list of %zd pieces; give 1 to %d of them",
                     count, TP_MAX_PIECES);
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GetItem(items, i); /* borrowed */
        if (py_read_int64(item, NULL, &shape->piece[i]) < 0) {
            py_raised_at("item %zd", i);
            goto done;
        }
    }
    shape->pieces = (int)count;
    result = 0;
done:
    Py_DECREF(items);
    return result;
}

static int
read_size(PyObject *item, int index, tp_shape *shape)
{
    int64_t *size = &shape->sizes[index];
    if (PyLong_Check(item)) {
        if (py_read_int64(item, NULL, size) < 0)
            return -1;
        if (*size != 0)
            return 0;
        PyErr_SetString(PyExc_ValueError,
                        "0 is no size; use -1 for one to be inferred");
        return -1;
    }
    if (!PyList_Check(item) && !PyTuple_Check(item))
        return py_wrong_type(item, NULL, "an int or a list of ints");
    if (shape->pieces > 0) {
        PyErr_SetString(PyExc_ValueError,
                        "a second list; at most one size can be a list");
        return -1;
    }
    *size = 0; /* marks the place of the list */
    return read_pieces(item, shape);
}

static int
read_shape(PyObject *value, const char *key, tp_spec *spec)
{
    if (value == Py_None)
        return 0;
    int result = -1;
    PyObject *items = py_read_sequence(value, key);
    if (items == NULL)
        return -1;
    const Py_ssize_t count = PyTuple_Size(items);
    if (count == 0 || count > TP_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s: has %zd dimensions; give 1 to %d of them",
                     key, count, TP_MAX_DIMS);
        goto done;
    }
    for (int i = 0; i < (int)count; i++) {
        if (read_size(PyTuple_GetItem(items, i), i, &spec->shape) < 0) {
            py_raised_at("%s[%d]", key, i);
            goto done;
        }
    }
    spec->shape.dims = (int)count;
    result = 0;
done:
    Py_DECREF(items);
    return result;
}

static int
read_gather_output(PyObject *value, const char *key, tp_spec *spec)
{
    return py_read_flag(value, key, &spec->gather_output);
}

static int
read_split_input(PyObject *value, const char *key, tp_spec *spec)
{
    return py_read_flag(value, key, &spec->split_input);
}

static int
read_sum_gradient(PyObject *value, const char *key, tp_spec *spec)
{
    return py_read_flag(value, key, &spec->sum_gradient);
}

enum { KEY_COUNT = 6 };

static const char *const keys[KEY_COUNT] = {
    "partition_type", "partition_dim", "shape",
    "gather_output",  "split_input",   "sum_gradient",
};

static int (*const readers[KEY_COUNT])(PyObject *, const char *, tp_spec *) = {
    read_partition,     read_dim,         read_shape,
    read_gather_output, read_split_input, read_sum_gradient,
};

static int
read_key(PyObject *key, PyObject *value, tp_spec *spec)
{
    const char *name = NULL;
    if (py_read_text(key, "key", &name) < 0)
        return -1;
    for (int i = 0; i < KEY_COUNT; i++)
        if (strcmp(name, keys[i]) == 0)
            return readers[i](value, name, spec);

    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "unknown key '%s'", name);
    tp_did_you_mean_add(&text, name, keys, KEY_COUNT);
    tp_text_fail(&text, TP_VALUE, &err);
    py_raise(&err);
    return -1;
}

int
py_spec_read(PyObject *mapping, const char *where, tp_spec *out)
{
    const tp_spec defaults = TP_NO_SPEC;
    *out = defaults;
    int result = -1;
    Py_ssize_t position = 0;
    PyObject *key = NULL, *value = NULL; /* borrowed */
    PyObject *given = py_read_mapping(mapping, where);
    /* Reading a shape may call code of the user, which could change what was given. */
    PyObject *dict = given == NULL ? NULL : PyDict_Copy(given);
    Py_XDECREF(given);
    if (dict == NULL)
        return -1;
    while (PyDict_Next(dict, &position, &key, &value)) {
        if (read_key(key, value, out) < 0) {
            py_raised_at("%s", where);
            goto done;
        }
    }
    tp_error err = TP_NO_ERROR;
    result = tp_spec_check(out, where, &err);
    if (result < 0)
        py_raise(&err);
done:
    Py_DECREF(dict);
    return result;
}

/* A tuple whose item at the place of the list is itself a tuple; None for no
 * shape. New, or NULL. */
static PyObject *
shape_tuple(const tp_shape *shape)
{
    if (shape->dims == 0)
        return Py_NewRef(Py_None);
    PyObject *tuple = py_int_tuple(shape->sizes, shape->dims);
    for (int i = 0; tuple != NULL && shape->pieces > 0 && i < shape->dims; i++) {
        if (shape->sizes[i] != 0)
            continue;
        py_tuple_put(&tuple, i, py_int_tuple(shape->piece, shape->pieces));
    }
    return tuple;
}

PyObject *
py_spec_dict(const tp_spec *spec)
{
    PyObject *dim = NULL, *dict = NULL;
    PyObject *shape = shape_tuple(&spec->shape);
    if (shape == NULL)
        return NULL;
    dim = spec->dim == -1 ? Py_NewRef(Py_None) : PyLong_FromLong(spec->dim);
    if (dim != NULL)
        dict = Py_BuildValue("{sssOsOsOsOsO}", "partition_type",
                             tp_partition_name(spec->partition), "partition_dim", dim,
                             "shape", shape, "gather_output",
                             spec->gather_output ? Py_True : Py_False, "split_input",
                             spec->split_input ? Py_True : Py_False, "sum_gradient",
                             spec->sum_gradient ? Py_True : Py_False);
    Py_XDECREF(dim);
    Py_DECREF(shape);
    return dict;
}
