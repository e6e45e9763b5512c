/* SPDX-License-Identifier: Apache-2.0 */
/* cost.c -- the functions of the module about memory, traffic and layouts. */
#include "python/module.h"

#include "core/cost/layouts.h"
#include "core/cost/rank_memory.h"
#include "core/cost/timeline.h"
#include "core/cost/traffic.h"
#include "python/args.h"

const char py_optimizer_states_doc[] =
    "optimizer_states(name, /)\n--\n\n"
    "Float32 values that an optimizer keeps per weight, by its name in lower case.\n\n"
    "ValueError, naming near ones, for one that is not known.";

PyObject *
py_optimizer_states(PyObject *module, PyObject *arg)
{
    (void)module;
    tp_error err = TP_NO_ERROR;
    const char *name = NULL;
    int states = 0;
    if (py_read_text(arg, "optimizer", &name) < 0)
        return NULL;
    if (tp_optimizer_states(name, &states, &err) < 0)
        return py_raise(&err);
    return PyLong_FromLong(states);
}

const char py_collective_seconds_doc[] =
    "collective_seconds(kind, size, ranks, bandwidth, /)\n--\n\n"
    "Seconds of a collective to which each rank gives ``size`` bytes, on a ring on "
    "which "
    "each\nsends ``bandwidth`` bytes per second.";

PyObject *
py_collective_seconds(PyObject *module, PyObject *args)
{
    (void)module;
    tp_error err = TP_NO_ERROR;
    tp_collective kind = TP_ALL_REDUCE;
    const char *name = NULL;
    long long size = 0, ranks = 0;
    double bandwidth = 0;
    if (!PyArg_ParseTuple(args, "sLLd:collective_seconds", &name, &size, &ranks,
                          &bandwidth))
        return NULL;
    if (tp_collective_of(name, &kind, &err) < 0)
        return py_raise(&err);
    if (!(bandwidth > 0) || ranks < 1) {
        PyErr_SetString(PyExc_ValueError,
                        "bandwidth and ranks: expected more than 0 of each");
        return NULL;
    }
    return PyFloat_FromDouble(tp_collective_seconds(kind, size, ranks, bandwidth));
}

/* New tuple (index, fits, reason) for each candidate, best first. */
static PyObject *
ordered(const tp_candidate *candidates, int count, int64_t memory, const int *order,
        int fitting)
{
    PyObject *result = PyTuple_New(count);
    for (int i = 0; result != NULL && i < count; i++) {
        tp_text text = TP_NO_TEXT;
        tp_layout_reason(&text, &candidates[order[i]],
                         i > 0 ? &candidates[order[i - 1]] : NULL,
                         &candidates[order[0]], memory);
        PyObject *row =
            text.failed ? PyErr_NoMemory()
                        : Py_BuildValue("(iOs)", order[i],
                                        i < fitting ? Py_True : Py_False, text.data);
        tp_text_free(&text);
        py_tuple_put(&result, i, row);
    }
    return result;
}

static int
read_candidate(PyObject *row, tp_candidate *out)
{
    long long replicas = 0, bytes = 0;
    if (py_check_tuple(row, "candidates", 5,
                       "tuples (tp, replicas, stage, bytes, seconds)") < 0 ||
        !PyArg_ParseTuple(row, "iLiLd", &out->tp, &replicas, &out->stage, &bytes,
                          &out->seconds))
        return -1;
    if (replicas < 1) {
        PyErr_Format(PyExc_ValueError, "replicas: got %lld, expected 1 or more",
                     replicas);
        return -1;
    }
    out->replicas = replicas;
    out->bytes = bytes;
    return 0;
}

const char py_order_layouts_doc[] =
    "order_layouts(candidates, memory, /)\n--\n\n"
    "(index, fits, reason) of each of ``candidates``, (tp, replicas, stage, bytes, "
    "seconds),\nbest first: what fits in ``memory`` bytes, by communication time over "
    "replicas, then\nreplicas, then stage.";

PyObject *
py_order_layouts(PyObject *module, PyObject *args)
{
    (void)module;
    tp_error err = TP_NO_ERROR;
    PyObject *rows_arg, *rows = NULL, *result = NULL;
    tp_candidate *candidates = NULL;
    int *order = NULL;
    int fitting = 0;
    long long memory = 0;
    if (!PyArg_ParseTuple(args, "OL:order_layouts", &rows_arg, &memory))
        return NULL;
    rows = py_read_sequence(rows_arg, "candidates"); /* new */
    if (rows == NULL)
        return NULL;
    const int count = (int)PyTuple_Size(rows);
    candidates = PyMem_Calloc((size_t)count + 1, sizeof(*candidates));
    order = PyMem_Calloc((size_t)count + 1, sizeof(*order));
    if (candidates == NULL || order == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (int i = 0; i < count; i++)
        if (read_candidate(PyTuple_GetItem(rows, i), &candidates[i]) < 0)
            goto done;
    if (tp_order_layouts(candidates, count, memory, order, &fitting, &err) < 0)
        py_raise(&err);
    else
        result = ordered(candidates, count, memory, order, fitting);
done:
    PyMem_Free(candidates);
    PyMem_Free(order);
    Py_DECREF(rows);
    return result;
}

const char py_activation_formula_doc[] =
    "activation_formula(layers, tokens, hidden, ranks, itemsize, sequence_parallel, "
    "checkpointing, /)\n--\n\n"
    "Bytes that a transformer keeps for its backward pass on one TP rank, by "
    "Korthikanti "
    "et\nal. 2022, with attention that keeps no scores.";

PyObject *
py_activation_formula(PyObject *module, PyObject *args)
{
    (void)module;
    long long layers = 0, tokens = 0, hidden = 0, ranks = 0;
    int64_t bytes = 0;
    tp_error err = TP_NO_ERROR;
    tp_formula_sizes sizes = {0};
    if (!PyArg_ParseTuple(args, "LLLLipp:activation_formula", &layers, &tokens, &hidden,
                          &ranks, &sizes.itemsize, &sizes.sequence_parallel,
                          &sizes.checkpointing))
        return NULL;
    sizes.layers = layers;
    sizes.tokens = tokens;
    sizes.hidden = hidden;
    sizes.ranks = ranks;
    if (tp_activation_formula(&sizes, &bytes, &err) < 0)
        return py_raise(&err);
    return PyLong_FromLongLong(bytes);
}
