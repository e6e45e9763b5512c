/* SPDX-License-Identifier: Apache-2.0 */
/* table_row.c -- the type Row: parameters that differ in indices only.
 *
 * A table has few rows, so a row holds its values and the C table goes at once. */
#include "python/table_row.h"

#include <stddef.h>
#include <structmember.h>

#include "python/args.h"
#include "python/holder.h"

typedef struct {
    PyObject_HEAD PyObject *pattern; /* strong, as the other two */
    PyObject *entry;
    PyObject *local_bytes;
    long long full_bytes;
    int count;
    int index;
} py_row;

static PyObject *
local_bytes(const tp_plan_table *table, int row, int ranks)
{
    PyObject *tuple = PyTuple_New(ranks);
    for (int rank = 0; tuple != NULL && rank < ranks; rank++)
        py_tuple_put(&tuple, rank,
                     PyLong_FromLongLong(tp_plan_table_bytes(table, row, rank)));
    return tuple;
}

static PyObject *
row_new(py_state *state, PyObject *holder, const tp_plan_table *table, int index)
{
    const tp_plan_row *from = tp_plan_table_row(table, index);
    const int ranks = tp_plan_ranks(((py_holder *)holder)->plan);
    PyObject *self = PyType_GenericAlloc(state->types[PY_ROW], 0);
    if (self == NULL)
        return NULL;
    py_row *row = (py_row *)self;
    row->count = from->count;
    row->index = from->entry;
    row->full_bytes = from->full_bytes;
    row->pattern = PyUnicode_FromString(from->pattern);
    row->entry = py_view_new(state, PY_ENTRY, holder, from->entry);
    row->local_bytes = local_bytes(table, index, ranks);
    if (row->pattern == NULL || row->entry == NULL || row->local_bytes == NULL)
        Py_CLEAR(self);
    return self;
}

PyObject *
py_row_table(py_state *state, PyObject *holder)
{
    tp_error err = TP_NO_ERROR;
    tp_plan_table *table = NULL;
    if (tp_plan_table_new(((py_holder *)holder)->plan, &table, &err) < 0)
        return py_raise(&err);
    const int count = tp_plan_table_count(table);
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i, row_new(state, holder, table, i));
    tp_plan_table_free(table);
    return tuple;
}

static void
row_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    py_row *row = (py_row *)self;
    Py_XDECREF(row->pattern);
    Py_XDECREF(row->entry);
    Py_XDECREF(row->local_bytes);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *
row_repr(PyObject *self)
{
    const py_row *row = (py_row *)self;
    return PyUnicode_FromFormat("<Row %U x %d>", row->pattern, row->count);
}

static PyMemberDef members[] = {
    {"pattern", T_OBJECT_EX, offsetof(py_row, pattern), READONLY,
     "The common name, with * for each index."},
    {"count", T_INT, offsetof(py_row, count), READONLY, "How many parameters."},
    {"entry", T_OBJECT_EX, offsetof(py_row, entry), READONLY, "The first of them."},
    {"index", T_INT, offsetof(py_row, index), READONLY,
     "Where that entry stands in Plan.entries."},
    {"full_bytes", T_LONGLONG, offsetof(py_row, full_bytes), READONLY,
     "Bytes of the full weights."},
    {"local_bytes", T_OBJECT_EX, offsetof(py_row, local_bytes), READONLY,
     "Bytes of the shards on each rank."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)"Parameters that differ in indices only; read-only."},
    {Py_tp_dealloc, PY_SLOT(row_dealloc)},
    {Py_tp_repr, PY_SLOT(row_repr)},
    {Py_tp_members, members},
    {0, NULL},
};

const PyType_Spec py_row_spec = {
    .name = "deepspeed_autotp._core.Row",
    .basicsize = sizeof(py_row),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
