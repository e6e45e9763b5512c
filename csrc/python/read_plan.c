/* SPDX-License-Identifier: Apache-2.0 */
/* read_plan.c -- `plan_reads`: the reads of slices of tensors in files. */
#include "python/module.h"

#include "core/reads/read_plan.h"
#include "python/args.h"

#define ITEMS \
    "a tuple (file, begin, itemsize, shape, starts, lengths, out_begin, out_strides)"

/* As many integers as `dims`, or as there are where that is -1. */
static int
read_sizes(PyObject *object, const char *what, int *dims, int64_t *out)
{
    int result = -1;
    PyObject *sizes = py_read_sequence(object, what);
    if (sizes == NULL)
        return -1;
    const Py_ssize_t count = PyTuple_Size(sizes);
    if (count > TP_MAX_DIMS || (*dims >= 0 && count != *dims)) {
        PyErr_Format(PyExc_ValueError, "%s: %zd values, expected %s", what, count,
                     *dims >= 0 ? "as many as shape has" : "8 at most");
        goto done;
    }
    if (py_read_int64s(sizes, what, out) < 0)
        goto done;
    *dims = (int)count;
    result = 0;
done:
    Py_DECREF(sizes);
    return result;
}

static int
read_box(PyObject *object, tp_box *box)
{
    if (py_check_tuple(object, "slices", 8, ITEMS) < 0)
        return -1;
    box->dims = -1;
    if (py_read_int(PyTuple_GetItem(object, 0), "file", &box->file) < 0 ||
        py_read_int64(PyTuple_GetItem(object, 1), "begin", &box->begin) < 0 ||
        py_read_int64(PyTuple_GetItem(object, 2), "itemsize", &box->item) < 0 ||
        read_sizes(PyTuple_GetItem(object, 3), "shape", &box->dims, box->shape) < 0 ||
        read_sizes(PyTuple_GetItem(object, 4), "starts", &box->dims, box->starts) < 0 ||
        read_sizes(PyTuple_GetItem(object, 5), "lengths", &box->dims, box->lengths) <
            0 ||
        py_read_int64(PyTuple_GetItem(object, 6), "out_begin", &box->out_begin) < 0 ||
        read_sizes(PyTuple_GetItem(object, 7), "out_strides", &box->dims,
                   box->out_strides) < 0)
        return -1;
    return 0;
}

static PyObject *
reads_tuple(const tp_reads *reads)
{
    PyObject *result = PyTuple_New((Py_ssize_t)reads->count);
    for (int64_t i = 0; result != NULL && i < reads->count; i++) {
        const tp_read *r = &reads->items[i];
        py_tuple_put(
            &result, (Py_ssize_t)i,
            Py_BuildValue("(iLLLLLL)", r->box, (long long)r->begin, (long long)r->rows,
                          (long long)r->row_bytes, (long long)r->stride,
                          (long long)r->out_begin, (long long)r->out_stride));
    }
    return result;
}

static PyObject *
spans_tuple(const tp_read_plan *plan)
{
    PyObject *result = PyTuple_New((Py_ssize_t)plan->span_count);
    for (int64_t i = 0; result != NULL && i < plan->span_count; i++) {
        const tp_span *span = &plan->spans[i];
        py_tuple_put(&result, (Py_ssize_t)i,
                     Py_BuildValue("(iLL)", span->file, (long long)span->begin,
                                   (long long)span->end));
    }
    return result;
}

const char py_plan_reads_doc[] =
    "plan_reads(slices, gap=0)\n--\n\n"
    "The reads of slices of tensors in files, the spans of the files in which these "
    "are,\nand how many bytes are read.";

PyObject *
py_plan_reads(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static const char *const names[] = {"slices", "gap", NULL};
    PyObject *slices_arg, *gap_arg = NULL, *slices = NULL, *result = NULL;
    int64_t gap = 0;
    tp_box *boxes = NULL;
    tp_read_plan plan = TP_NO_READ_PLAN;
    tp_error err = TP_NO_ERROR;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:plan_reads", (char **)names,
                                     &slices_arg, &gap_arg) ||
        py_read_int64(gap_arg, "gap", &gap) < 0)
        return NULL;
    slices = py_read_sequence(slices_arg, "slices");
    if (slices == NULL)
        return NULL;
    const Py_ssize_t count = PyTuple_Size(slices);
    boxes = PyMem_Calloc((size_t)count + 1, sizeof(*boxes));
    if (boxes == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (read_box(PyTuple_GetItem(slices, i), &boxes[i]) < 0)
            goto done;
    if (tp_read_plan_make(boxes, (int)count, gap, &plan, &err) < 0) {
        py_raise(&err);
        goto done;
    }
    result = Py_BuildValue("(NNL)", reads_tuple(&plan.reads), spans_tuple(&plan),
                           (long long)plan.bytes);
done:
    tp_read_plan_clear(&plan);
    PyMem_Free(boxes);
    Py_DECREF(slices);
    return result;
}
