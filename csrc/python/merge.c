/* SPDX-License-Identifier: Apache-2.0 */
/* merge.c -- recorded arguments against the configuration, as a function. */
#include "python/module.h"

#include "core/config/merge_recorded_args.h"

#include "python/args.h"
#include "python/records.h"

/* What merge was called with; borrowed, NULL where nothing was given. */
typedef struct {
    PyObject *record, *autotp_size, *tp_size, *tp_group, *tp_group_size, *section;
    PyObject *dtype, *bf16, *fp16, *has_mpu, *has_mesh;
} arguments;

static int
parse(PyObject *args, PyObject *kwargs, arguments *given)
{
    static const char *const names[] = {
        "record", "autotp_size", "tp_size", "tp_group", "tp_group_size", "section",
        "dtype",  "bf16",        "fp16",    "has_mpu",  "has_mesh",      NULL,
    };
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O|$OOOOOOOOOO:merge", (char **)names, &given->record,
            &given->autotp_size, &given->tp_size, &given->tp_group,
            &given->tp_group_size, &given->section, &given->dtype, &given->bf16,
            &given->fp16, &given->has_mpu, &given->has_mesh))
        return -1;
    return 0;
}

static int
read_facts(const arguments *given, tp_merge_facts *facts)
{
    if (py_read_int64(given->autotp_size, "autotp_size", &facts->autotp_size) < 0 ||
        py_read_int64(given->tp_size, "tp_size", &facts->tp_size) < 0 ||
        py_read_int64(given->tp_group, "tp_group", &facts->tp_group) < 0 ||
        py_read_int64(given->tp_group_size, "tp_group_size", &facts->tp_group_size) <
            0 ||
        py_read_optional_text(given->dtype, "dtype", &facts->dtype) < 0 ||
        py_read_flag(given->bf16, "bf16", &facts->bf16) < 0 ||
        py_read_flag(given->fp16, "fp16", &facts->fp16) < 0 ||
        py_read_flag(given->has_mpu, "has_mpu", &facts->has_mpu) < 0 ||
        py_read_flag(given->has_mesh, "has_mesh", &facts->has_mesh) < 0)
        return -1;
    if (given->section == NULL)
        return 0;
    return py_read_text(given->section, "section", &facts->section);
}

/* New: an int, or None where nothing has to be written. */
static PyObject *
size_or_none(int64_t size)
{
    return size == -1 ? Py_NewRef(Py_None) : PyLong_FromLongLong(size);
}

static PyObject *
fill_dict(const tp_merge_fill *fill)
{
    PyObject *autotp_size = size_or_none(fill->autotp_size);
    PyObject *tp_size = size_or_none(fill->tp_size);
    PyObject *dict = NULL;
    if (autotp_size != NULL && tp_size != NULL)
        dict = Py_BuildValue("{sOsOsOsO}", "autotp_size", autotp_size, "tp_size",
                             tp_size, "tp_group", fill->tp_group ? Py_True : Py_False,
                             "make_groups", fill->make_groups ? Py_True : Py_False);
    Py_XDECREF(autotp_size);
    Py_XDECREF(tp_size);
    return dict;
}

const char py_merge_doc[] =
    "merge(record, *, autotp_size=-1, tp_size=-1, tp_group=0, tp_group_size=0, "
    "section='tp', dtype=None, bf16=False, fp16=False, has_mpu=False, "
    "has_mesh=False)\n--\n\n"
    "Compare a record with the configuration and say what has to be filled in.\n\n"
    "``record`` is (tp_size, dtype, group, group_size) as Records returns it, or "
    "None.\n"
    "Returns {\"autotp_size\": int or None, \"tp_size\": int or None, \"tp_group\": "
    "bool,\n"
    "\"make_groups\": bool}. One ValueError lists all conflicts.";

PyObject *
py_merge(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    arguments given = {0};
    tp_record record = {0};
    tp_merge_facts facts = {.autotp_size = -1, .tp_size = -1, .section = "tp"};
    tp_merge_fill fill = {.autotp_size = -1, .tp_size = -1};
    tp_error err = TP_NO_ERROR;
    if (parse(args, kwargs, &given) < 0)
        return NULL;
    const bool recorded = given.record != Py_None;
    if (recorded && py_record_read(given.record, &record) < 0)
        return NULL;
    if (read_facts(&given, &facts) < 0)
        return NULL;
    if (tp_merge(recorded ? &record : NULL, &facts, &fill, &err) < 0)
        return py_raise(&err);
    return fill_dict(&fill);
}
