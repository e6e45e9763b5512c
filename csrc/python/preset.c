/* SPDX-License-Identifier: Apache-2.0 */
/* preset.c -- the table of presets as Python values. */
#include "python/module.h"

#include "core/rules/preset.h"

#include "python/args.h"
#include "python/spec.h"

const char py_preset_names_doc[] =
    "preset_names()\n--\n\n"
    "The names of the presets.";

PyObject *
py_preset_names(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    int count = 0;
    const char *const *names = tp_preset_names(&count);
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i, PyUnicode_FromString(names[i]));
    return tuple;
}

/* New: (pattern, spec). */
static PyObject *
row_tuple(const tp_preset_row *row)
{
    PyObject *spec = py_spec_dict(&row->spec);
    return spec == NULL ? NULL : Py_BuildValue("sN", row->pattern, spec);
}

const char py_preset_rows_doc[] =
    "preset_rows(name, /)\n--\n\n"
    "The (pattern, spec) pairs of a preset; spec as check_spec returns it.\n\n"
    "ValueError with the nearest presets for an unknown name.";

PyObject *
py_preset_rows(PyObject *module, PyObject *name)
{
    (void)module;
    const char *text = NULL;
    const tp_preset *preset = NULL;
    tp_error err = TP_NO_ERROR;
    if (py_read_text(name, "name", &text) < 0)
        return NULL;
    if (tp_preset_find(text, &preset, &err) < 0)
        return py_raise(&err);
    PyObject *rows = PyTuple_New(preset->count);
    for (int i = 0; rows != NULL && i < preset->count; i++)
        py_tuple_put(&rows, i, row_tuple(&preset->rows[i]));
    return rows;
}
