/* SPDX-License-Identifier: Apache-2.0 */
/* enums.c -- the kinds and sources of a plan as Python enums. */
#include "python/enums.h"

#include "python/args.h"

/* Members by the value that C has for them. */
static const char *const kinds[] = {
    [TP_REPLICATED] = "REPLICATED",
    [TP_REPLICATED_SUM] = "REPLICATED_SUM",
    [TP_SKIPPED] = "SKIPPED",
    [TP_COLUMN] = "COLUMN",
    [TP_ROW] = "ROW",
    [TP_VOCABULARY] = "VOCABULARY",
    [TP_HIDDEN] = "HIDDEN",
    [TP_EXPERTS] = "EXPERTS",
    [TP_WHOLE_EXPERTS] = "WHOLE_EXPERTS",
    [TP_WHOLE_EXPERT_BLOCKS] = "WHOLE_EXPERT_BLOCKS",
    [TP_EXPERTS_COLUMN] = "EXPERTS_COLUMN",
    [TP_EXPERTS_ROW] = "EXPERTS_ROW",
    [TP_SHARE] = "SHARE",
    [TP_ROPE] = "ROPE",
    [TP_NORM] = "NORM",
    [TP_HEADS] = "HEADS",
};
static const char *const sources[] = {
    [TP_FROM_CONFIG] = "PARTITION_CONFIG",
    [TP_FROM_PRESET] = "PRESET",
    [TP_FROM_HF] = "TP_PLAN",
    [TP_FROM_FAMILY] = "FAMILY",
    [TP_FROM_HEURISTIC] = "HEURISTIC",
    [TP_FROM_DEFAULT] = "DEFAULT",
    [TP_FROM_NOTHING] = "NONE",
};
enum {
    KINDS = sizeof(kinds) / sizeof(kinds[0]),
    SOURCES = sizeof(sources) / sizeof(sources[0])
};

const char *const py_enum_names[] = {"Kind", "Source", NULL};

static const char *
kind_text(int value)
{
    return tp_kind_name((tp_kind)value);
}

static const char *
source_text(int value)
{
    return tp_source_name((tp_source)value);
}

/* A tuple of the members of a new StrEnum `name`, which goes into the module. */
static PyObject *
make(PyObject *module, const char *name, const char *const *members, int count,
     const char *(*text)(int))
{
    PyObject *result = NULL, *type = NULL, *args = NULL, *kwargs = NULL, *base = NULL;
    PyObject *library = PyImport_ImportModule("enum");
    PyObject *pairs = PyTuple_New(count);
    for (int i = 0; pairs != NULL && i < count; i++)
        py_tuple_put(&pairs, i, Py_BuildValue("ss", members[i], text(i)));
    if (library == NULL || pairs == NULL)
        goto done;
    base = PyObject_GetAttrString(library, "StrEnum");
    args = Py_BuildValue("sO", name, pairs);
    kwargs = Py_BuildValue("{ss}", "module", "deepspeed_autotp._core");
    if (base == NULL || args == NULL || kwargs == NULL)
        goto done;
    type = PyObject_Call(base, args, kwargs);
    if (type == NULL || PyModule_AddObjectRef(module, name, type) < 0)
        goto done;
    result = PyTuple_New(count);
    for (int i = 0; result != NULL && i < count; i++)
        py_tuple_put(&result, i, PyObject_GetAttrString(type, members[i]));
done:
    Py_XDECREF(library);
    Py_XDECREF(pairs);
    Py_XDECREF(base);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    Py_XDECREF(type);
    return result;
}

int
py_enums_add(PyObject *module, py_state *state)
{
    state->kinds = make(module, py_enum_names[0], kinds, KINDS, kind_text);
    if (state->kinds == NULL)
        return -1;
    state->sources = make(module, py_enum_names[1], sources, SOURCES, source_text);
    return state->sources == NULL ? -1 : 0;
}

PyObject *
py_kind(const py_state *state, tp_kind kind)
{
    return Py_XNewRef(PyTuple_GetItem(state->kinds, kind));
}

PyObject *
py_source(const py_state *state, tp_source source)
{
    return Py_XNewRef(PyTuple_GetItem(state->sources, source));
}
