/* SPDX-License-Identifier: Apache-2.0 */
/* timeline.c -- `timeline_peak`: the most that is alive at once in a step. */
#include "core/cost/timeline.h"

#include "python/module.h"

#include "python/args.h"

/* (live, gradients) */
static int
read_moment(PyObject *pair, tp_moment *out)
{
    long long live = 0, gradients = 0;
    if (py_check_tuple(pair, "parts", 2, "tuples (live, gradients)") < 0 ||
        !PyArg_ParseTuple(pair, "LL", &live, &gradients))
        return -1;
    *out = (tp_moment){live, gradients};
    return 0;
}

/* (end, moments, repeats); the moments are to be freed with PyMem_Free. */
static int
read_part(PyObject *row, tp_part *out)
{
    PyObject *end, *moments_arg, *items;
    if (py_check_tuple(row, "parts", 3, "tuples (end, moments, repeats)") < 0 ||
        !PyArg_ParseTuple(row, "OOi", &end, &moments_arg, &out->repeats) ||
        read_moment(end, &out->end) < 0)
        return -1;
    items = py_read_sequence(moments_arg, "parts: moments"); /* new */
    if (items == NULL)
        return -1;
    int result = -1;
    const int count = (int)PyTuple_Size(items);
    tp_moment *moments = PyMem_Calloc((size_t)count + 1, sizeof(*moments));
    if (moments == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    out->moments = moments;
    out->count = count;
    for (int i = 0; i < count; i++)
        if (read_moment(PyTuple_GetItem(items, i), &moments[i]) < 0)
            goto done;
    result = 0;
done:
    Py_DECREF(items);
    return result;
}

const char py_timeline_peak_doc[] =
    "timeline_peak(parts, share, /)\n--\n\n"
    "(live, gradients) at the moment of a step at which live + share * gradients is "
    "largest.\n\n"
    "``parts`` are tuples (end, moments, repeats), in order: what each adds, and what "
    "is "
    "alive in\nit above its start, as pairs (live, gradients) of bytes.";

PyObject *
py_timeline_peak(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *rows_arg, *rows, *result = NULL;
    double share = 1;
    if (!PyArg_ParseTuple(args, "Od:timeline_peak", &rows_arg, &share))
        return NULL;
    rows = py_read_sequence(rows_arg, "parts"); /* new */
    if (rows == NULL)
        return NULL;
    const int count = (int)PyTuple_Size(rows);
    tp_part *parts = PyMem_Calloc((size_t)count + 1, sizeof(*parts));
    if (parts == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (int i = 0; i < count; i++)
        if (read_part(PyTuple_GetItem(rows, i), &parts[i]) < 0)
            goto done;
    const tp_moment peak = tp_timeline_peak(parts, count, share);
    result = Py_BuildValue("(LL)", (long long)peak.live, (long long)peak.gradients);
done:
    for (int i = 0; parts != NULL && i < count; i++)
        PyMem_Free((void *)parts[i].moments);
    PyMem_Free(parts);
    Py_DECREF(rows);
    return result;
}
