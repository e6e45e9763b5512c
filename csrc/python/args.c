/* SPDX-License-Identifier: Apache-2.0 */
/* args.c -- Python arguments to C values, and C errors to exceptions.
 *
 * Conversions are strict: a bool is no int, a str is no sequence, and nothing
 * here calls a method of the user's objects while C data is being read. */
#include "python/args.h"

#include <limits.h>
#include <stdarg.h>
#include <string.h>

static PyObject *
exception_type(tp_code code)
{
    switch (code) {
        case TP_VALUE:
        case TP_LIMIT:
            return PyExc_ValueError;
        case TP_TYPE:
            return PyExc_TypeError;
        case TP_MEMORY:
            return PyExc_MemoryError;
        case TP_OK:
        case TP_RAISED:
        case TP_PEER:
        case TP_BUG:
            break;
    }
    return PyExc_RuntimeError;
}

void *
py_raise(tp_error *err)
{
    const bool raised = err->code == TP_RAISED && PyErr_Occurred() != NULL;
    if (!raised) {
        /* A name may have been truncated in the middle of a character. */
        const char *message = tp_error_text(err);
        PyObject *text =
            PyUnicode_DecodeUTF8(message, (Py_ssize_t)strlen(message), "replace");
        if (text != NULL)
            PyErr_SetObject(exception_type(err->code), text);
        Py_XDECREF(text);
    }
    tp_error_clear(err);
    return NULL;
}

/* What a message starts with. */
#define AT(what) (what) == NULL ? "" : (what), (what) == NULL ? "" : ": "

int
py_wrong_type(PyObject *object, const char *what, const char *expected)
{
    PyObject *name = object == Py_None ? PyUnicode_FromString("None")
                                       : PyType_GetName(Py_TYPE(object));
    if (name != NULL)
        PyErr_Format(PyExc_TypeError, "%s%sexpected %s, got %U", AT(what), expected,
                     name);
    Py_XDECREF(name);
    return -1;
}

void
py_set_cause(PyObject *cause)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyException_SetCause(value, cause);
    PyErr_Restore(type, value, trace);
}

int
py_raised_at(const char *format, ...)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (type != PyExc_TypeError && type != PyExc_ValueError) {
        PyErr_Restore(type, value, trace);
        return -1;
    }
    va_list args;
    va_start(args, format);
    PyObject *where = PyUnicode_FromFormatV(format, args);
    va_end(args);
    if (where != NULL) {
        PyObject *cause = PyException_GetCause(value);
        PyErr_Format(type, "%U: %S", where, value);
        if (cause != NULL)
            py_set_cause(cause);
    }
    Py_XDECREF(where);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return -1;
}

int
py_check_required(PyObject *object, const char *name)
{
    if (object != NULL)
        return 0;
    PyErr_Format(PyExc_TypeError, "missing required keyword-only argument: '%s'", name);
    return -1;
}

int
py_read_text(PyObject *object, const char *what, const char **out)
{
    if (!PyUnicode_Check(object))
        return py_wrong_type(object, what, "a str");
    Py_ssize_t size = 0;
    const char *data = PyUnicode_AsUTF8AndSize(object, &size);
    if (data == NULL) {
        if (PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s%s%.300A holds a lone surrogate",
                         AT(what), object);
        }
        return -1;
    }
    if (strlen(data) != (size_t)size) {
        PyErr_Format(PyExc_ValueError, "%s%s%.300A holds a null character", AT(what),
                     object);
        return -1;
    }
    *out = data;
    return 0;
}

int
py_read_optional_text(PyObject *object, const char *what, const char **out)
{
    *out = NULL;
    if (object == NULL || object == Py_None)
        return 0;
    return PyUnicode_Check(object) ? py_read_text(object, what, out)
                                   : py_wrong_type(object, what, "a str or None");
}

int
py_read_int64(PyObject *object, const char *what, int64_t *out)
{
    if (object == NULL)
        return 0;
    if (!PyLong_Check(object) || PyBool_Check(object))
        return py_wrong_type(object, what, "an int");
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow != 0) {
        PyErr_Format(PyExc_ValueError, "%s%sthe int does not fit in 64 bits", AT(what));
        return -1;
    }
    *out = value;
    return 0;
}

int
py_read_int64s(PyObject *items, const char *what, int64_t *values)
{
    const Py_ssize_t count = PyTuple_Size(items);
    for (Py_ssize_t i = 0; i < count; i++)
        if (py_read_int64(PyTuple_GetItem(items, i), what, &values[i]) < 0)
            return -1;
    return 0;
}

int
py_read_int(PyObject *object, const char *what, int *out)
{
    int64_t value = *out;
    if (py_read_int64(object, what, &value) < 0)
        return -1;
    if (value < INT_MIN || value > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "%s%s%lld does not fit in 32 bits", AT(what),
                     (long long)value);
        return -1;
    }
    *out = (int)value;
    return 0;
}

int
py_read_flag(PyObject *object, const char *what, bool *out)
{
    if (object == NULL)
        return 0;
    if (!PyBool_Check(object))
        return py_wrong_type(object, what, "True or False");
    *out = object == Py_True;
    return 0;
}

PyObject *
py_read_sequence(PyObject *object, const char *what)
{
    if (PyTuple_CheckExact(object))
        return Py_NewRef(object);
    if (PyUnicode_Check(object) || PyBytes_Check(object) || PyDict_Check(object) ||
        !PySequence_Check(object)) {
        py_wrong_type(object, what, "a list or tuple");
        return NULL;
    }
    return PySequence_Tuple(object);
}

int
py_check_tuple(PyObject *object, const char *what, Py_ssize_t size, const char *items)
{
    if (!PyTuple_Check(object))
        return py_wrong_type(object, what, items);
    if (PyTuple_Size(object) == size)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s%sexpected %s, got %zd items", AT(what), items,
                 PyTuple_Size(object));
    return -1;
}

PyObject *
py_read_mapping(PyObject *object, const char *what)
{
    if (PyDict_CheckExact(object))
        return Py_NewRef(object);
    PyObject *keys =
        PyMapping_Check(object) ? PyObject_GetAttrString(object, "keys") : NULL;
    if (keys == NULL) {
        PyErr_Clear();
        py_wrong_type(object, what, "a dict");
        return NULL;
    }
    Py_DECREF(keys);
    PyObject *dict = PyDict_New();
    if (dict != NULL && PyDict_Update(dict, object) < 0)
        Py_CLEAR(dict);
    return dict;
}

int
py_texts_read(py_texts *texts, PyObject *object, const char *what)
{
    texts->owner = py_read_sequence(object, what);
    if (texts->owner == NULL)
        return -1;
    const Py_ssize_t count = PyTuple_Size(texts->owner);
    texts->items = PyMem_Calloc((size_t)count + 1, sizeof(*texts->items));
    if (texts->items == NULL || count > INT_MAX) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GetItem(texts->owner, i); /* borrowed */
        if (py_read_text(item, NULL, &texts->items[i]) < 0)
            return py_raised_at("%s[%zd]", what, i);
    }
    texts->count = (int)count;
    return 0;
}

void
py_texts_clear(py_texts *texts)
{
    PyMem_Free(texts->items);
    Py_CLEAR(texts->owner);
    texts->items = NULL;
    texts->count = 0;
}

void
py_tuple_put(PyObject **tuple, Py_ssize_t index, PyObject *item)
{
    if (item == NULL)
        Py_CLEAR(*tuple);
    else
        PyTuple_SetItem(*tuple, index, item);
}

PyObject *
py_int_tuple(const int64_t *values, int count)
{
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i, PyLong_FromLongLong(values[i]));
    return tuple;
}
