/* SPDX-License-Identifier: Apache-2.0 */
/* records.c -- the type Records: the arguments that tp_model_init recorded. */
#include "python/records.h"

#include "core/base/dtype.h"
#include "python/args.h"

typedef struct {
    PyObject_HEAD tp_records *records; /* owned */
} py_records;

static tp_records *
get(PyObject *self)
{
    return ((py_records *)self)->records;
}

/* The core keeps no copy of a dtype's name, so it must be the static one. */
static int
read_dtype(PyObject *object, const char *what, tp_record *record)
{
    const char *spelling = NULL;
    tp_error err = TP_NO_ERROR;
    if (py_read_text(object, what, &spelling) < 0)
        return -1;
    if (tp_dtype_name(spelling, what, &record->dtype, &err) < 0) {
        py_raise(&err);
        return -1;
    }
    return 0;
}

int
py_record_read(PyObject *tuple, tp_record *out)
{
    if (py_check_tuple(tuple, "record", 4,
                       "a tuple (tp_size, dtype, group, group_size) or None") < 0)
        return -1;
    if (py_read_int64(PyTuple_GetItem(tuple, 0), "record: tp_size", &out->tp_size) <
            0 ||
        read_dtype(PyTuple_GetItem(tuple, 1), "record: dtype", out) < 0 ||
        py_read_int64(PyTuple_GetItem(tuple, 2), "record: group", &out->group) < 0)
        return -1;
    return py_read_int64(PyTuple_GetItem(tuple, 3), "record: group_size",
                         &out->group_size);
}

/* New tuple, or NULL. */
static PyObject *
record_tuple(const tp_record *record)
{
    return Py_BuildValue("LsLL", (long long)record->tp_size, record->dtype,
                         (long long)record->group, (long long)record->group_size);
}

static PyObject *
records_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Records", (char **)names))
        return NULL;
    PyObject *self = PyType_GenericAlloc(type, 0);
    tp_error err = TP_NO_ERROR;
    if (self != NULL && tp_records_new(&((py_records *)self)->records, &err) < 0) {
        py_raise(&err);
        Py_CLEAR(self);
    }
    return self;
}

static void
records_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    tp_records_free(get(self));
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *
records_add(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"key",   "tp_size",    "dtype",
                                        "group", "group_size", NULL};
    PyObject *key_arg, *size_arg, *dtype_arg, *group_arg = NULL, *ranks_arg = NULL;
    int64_t key = 0;
    tp_record record = {0};
    tp_error err = TP_NO_ERROR;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|OO:add", (char **)names,
                                     &key_arg, &size_arg, &dtype_arg, &group_arg,
                                     &ranks_arg) ||
        py_read_int64(key_arg, "key", &key) < 0 ||
        py_read_int64(size_arg, "tp_size", &record.tp_size) < 0 ||
        read_dtype(dtype_arg, "dtype", &record) < 0 ||
        py_read_int64(group_arg, "group", &record.group) < 0 ||
        py_read_int64(ranks_arg, "group_size", &record.group_size) < 0)
        return NULL;
    if (tp_records_add(get(self), key, &record, &err) < 0)
        return py_raise(&err);
    Py_RETURN_NONE;
}

static PyObject *
records_find(PyObject *self, PyObject *arg)
{
    int64_t key = 0;
    if (py_read_int64(arg, "key", &key) < 0)
        return NULL;
    const tp_record *record = tp_records_find(get(self), key);
    return record == NULL ? Py_NewRef(Py_None) : record_tuple(record);
}

static PyObject *
records_latest(PyObject *self, PyObject *unused)
{
    (void)unused;
    int64_t key = 0;
    const tp_record *record = tp_records_latest(get(self), &key);
    if (record == NULL)
        Py_RETURN_NONE;
    PyObject *tuple = record_tuple(record);
    return tuple == NULL ? NULL : Py_BuildValue("LN", (long long)key, tuple);
}

static PyObject *
records_remove(PyObject *self, PyObject *arg)
{
    int64_t key = 0;
    if (py_read_int64(arg, "key", &key) < 0)
        return NULL;
    tp_records_remove(get(self), key);
    Py_RETURN_NONE;
}

static PyObject *
records_clear(PyObject *self, PyObject *unused)
{
    (void)unused;
    tp_records_clear(get(self));
    Py_RETURN_NONE;
}

static Py_ssize_t
records_length(PyObject *self)
{
    return tp_records_count(get(self));
}

static PyMethodDef methods[] = {
    {"add", PY_KEYWORDS(records_add), METH_VARARGS | METH_KEYWORDS,
     "add($self, key, tp_size, dtype, group=0, group_size=0)\n--\n\n"
     "Record under ``key``, replacing what is there.\n\n"
     "ValueError naming both values when a live record says otherwise."},
    {"find", records_find, METH_O,
     "find($self, key, /)\n--\n\n"
     "The record (tp_size, dtype, group, group_size) under ``key``, or None."},
    {"latest", records_latest, METH_NOARGS,
     "latest($self)\n--\n\n"
     "The record added last that is still there, as (key, record), or None."},
    {"remove", records_remove, METH_O,
     "remove($self, key, /)\n--\n\n"
     "Forget the record under ``key``, if there is one."},
    {"clear", records_clear, METH_NOARGS,
     "clear($self)\n--\n\n"
     "Forget all records."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)"Records()\n--\n\n"
                        "The arguments that tp_model_init recorded, one record per "
                        "model."},
    {Py_tp_new, PY_SLOT(records_new)},
    {Py_tp_dealloc, PY_SLOT(records_dealloc)},
    {Py_sq_length, PY_SLOT(records_length)},
    {Py_tp_methods, methods},
    {0, NULL},
};

const PyType_Spec py_records_spec = {
    .name = "deepspeed_autotp._core.Records",
    .basicsize = sizeof(py_records),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
