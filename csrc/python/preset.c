/* SPDX-License-Identifier: Apache-2.0 */
/* preset.c -- the table of presets as Python values. */
#include "module.h"

#include "../core/preset.h"

#include "args.h"
#include "spec.h"

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
    for (int i = 0; tuple != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SetItem(tuple, i, name); /* stolen */
    }
    return tuple;
}

const char py_preset_rows_doc[] =
    "preset_rows(name, /)\n--\n\n"
    "The (pattern, spec) pairs of a preset; spec as check_spec returns it.\n\n"
    "ValueError with the nearest presets for a name that nobody knows.";

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
    for (int i = 0; rows != NULL && i < preset->count; i++) {
        PyObject *spec = py_spec_dict(&preset->rows[i].spec);
        PyObject *row =
            spec == NULL ? NULL : Py_BuildValue("sN", preset->rows[i].pattern, spec);
        if (row == NULL)
            Py_CLEAR(rows);
        else
            PyTuple_SetItem(rows, i, row); /* stolen */
    }
    return rows;
}
