/* SPDX-License-Identifier: Apache-2.0 */
/* reshard.c -- `reshard`: which pieces of old shards make a new one. */
#include "core/layout/reshard.h"

#include <limits.h>
#include <stdlib.h>

#include "python/args.h"

/* The values of a list of runs, to be freed with PyMem_Free. */
static int
read_runs(PyObject *object, const char *what, tp_run_list *runs)
{
    PyObject *items = py_read_sequence(object, what); /* new */
    if (items == NULL)
        return -1;
    int result = -1;
    const Py_ssize_t count = PyTuple_Size(items);
    int64_t *values = PyMem_Calloc((size_t)count + 1, sizeof(*values));
    if (values == NULL || count > INT_MAX) {
        PyErr_NoMemory();
        goto done;
    }
    if (py_read_int64s(items, what, values) < 0)
        goto done;
    *runs = (tp_run_list){values, (int)count};
    values = NULL;
    result = 0;
done:
    PyMem_Free(values);
    Py_DECREF(items);
    return result;
}

static PyObject *
copies_tuple(const tp_reshard_copy *copies, int count)
{
    PyObject *result = PyTuple_New(count);
    for (int i = 0; result != NULL && i < count; i++)
        py_tuple_put(
            &result, i,
            Py_BuildValue("iLLL", copies[i].rank, (long long)copies[i].from,
                          (long long)copies[i].to, (long long)copies[i].length));
    return result;
}

const char py_reshard_doc[] =
    "reshard(sources, target)\n--\n\n"
    "The copies that make a new shard out of old ones: tuples (old rank, offset in "
    "its\n"
    "shard, offset in the new shard, length), in the order of the new shard.\n\n"
    "``sources`` are the runs of every old rank and ``target`` those of the new "
    "shard,\n"
    "start, length, start, length, ... each. What several old ranks hold is taken "
    "from\n"
    "the lowest. ValueError where no old rank holds what is asked for.";

PyObject *
py_reshard(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static const char *const names[] = {"sources", "target", NULL};
    PyObject *sources_arg, *target_arg, *items = NULL, *result = NULL;
    tp_run_list target = {NULL, 0};
    tp_run_list *sources = NULL;
    tp_reshard_copy *copies = NULL;
    int count = 0;
    Py_ssize_t ranks = 0;
    tp_error err = TP_NO_ERROR;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:reshard", (char **)names,
                                     &sources_arg, &target_arg) ||
        read_runs(target_arg, "target", &target) < 0)
        return NULL;
    items = py_read_sequence(sources_arg, "sources"); /* new */
    if (items == NULL)
        goto done;
    ranks = PyTuple_Size(items);
    sources = PyMem_Calloc((size_t)ranks + 1, sizeof(*sources));
    if (sources == NULL || ranks > INT_MAX) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < ranks; i++)
        if (read_runs(PyTuple_GetItem(items, i), "sources", &sources[i]) < 0)
            goto done;
    if (tp_reshard(sources, (int)ranks, target, &copies, &count, &err) < 0)
        py_raise(&err);
    else
        result = copies_tuple(copies, count);
done:
    for (Py_ssize_t i = 0; sources != NULL && i < ranks; i++)
        PyMem_Free((void *)sources[i].values);
    PyMem_Free(sources);
    PyMem_Free((void *)target.values);
    free(copies);
    Py_XDECREF(items);
    return result;
}
