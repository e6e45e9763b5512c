/* SPDX-License-Identifier: Apache-2.0 */
/* tp_size.c -- `settle_tp_size`: the TP size that all sources agree on. */
#include "python/module.h"

#include "core/config/tp_size.h"

#include "python/args.h"

/* The texts of `source` are borrowed from `pair`. */
static int
read_source(PyObject *pair, tp_size_source *source)
{
    if (py_check_tuple(pair, "sources", 2, "tuples (where, size)") < 0 ||
        py_read_text(PyTuple_GetItem(pair, 0), "sources: where", &source->where) < 0)
        return -1;
    return py_read_int64(PyTuple_GetItem(pair, 1), source->where, &source->size);
}

const char py_settle_tp_size_doc[] =
    "settle_tp_size(sources, /)\n--\n\n"
    "The TP size that all of ``sources`` agree on, each a tuple (where, size).\n\n"
    "A size of -1 is not stated; 0 is the size 1. None where no source states one.\n"
    "ValueError, naming all sources, where two differ.";

PyObject *
py_settle_tp_size(PyObject *module, PyObject *arg)
{
    (void)module;
    tp_error err = TP_NO_ERROR;
    int64_t size = -1;
    PyObject *result = NULL;
    tp_size_source *sources = NULL;
    PyObject *pairs = py_read_sequence(arg, "sources"); /* new */
    if (pairs == NULL)
        return NULL;

    const int count = (int)PyTuple_Size(pairs);
    sources = PyMem_Calloc((size_t)count + 1, sizeof(*sources));
    if (sources == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (int i = 0; i < count; i++) {
        if (read_source(PyTuple_GetItem(pairs, i), &sources[i]) < 0)
            goto done;
    }
    if (tp_size_settle(sources, count, &size, &err) < 0)
        py_raise(&err);
    else
        result = size < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(size);
done:
    PyMem_Free(sources);
    Py_DECREF(pairs);
    return result;
}
