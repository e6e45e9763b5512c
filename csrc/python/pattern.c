/* SPDX-License-Identifier: Apache-2.0 */
/* pattern.c -- the type Pattern: one pattern with the results of re.match.
 *
 * The GIL is kept while a pattern runs: the fallback needs it, names are short,
 * and PCRE2 stops at its match limit. */
#include "python/pattern.h"

#include "python/args.h"

typedef struct {
    PyObject_HEAD tp_regex *regex; /* owned */
} py_pattern;

static int
fallback_match(void *context, const char *subject, size_t size, tp_error *err)
{
    PyObject *found = NULL;
    PyObject *text = PyUnicode_DecodeUTF8(subject, (Py_ssize_t)size, NULL);
    if (text != NULL)
        found = PyObject_CallFunctionObjArgs(context, text, NULL);
    Py_XDECREF(text);
    if (found == NULL)
        return tp_fail(err, TP_RAISED, "re.match raised an exception");
    const int matched = found != Py_None;
    Py_DECREF(found);
    return matched;
}

static void
fallback_release(void *context)
{
    Py_XDECREF((PyObject *)context);
}

/* Turn what re.compile raises for a bad pattern into a ValueError that keeps it
 * as its cause; any other exception stays. */
static void
refuse_pattern(py_state *state, PyObject *pattern)
{
    if (!PyErr_ExceptionMatches(state->re_error) &&
        !PyErr_ExceptionMatches(PyExc_OverflowError) &&
        !PyErr_ExceptionMatches(PyExc_RecursionError))
        return;
    PyObject *type = NULL, *cause = NULL, *trace = NULL;
    PyErr_Fetch(&type, &cause, &trace);
    PyErr_NormalizeException(&type, &cause, &trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    PyErr_Format(PyExc_ValueError, "pattern %.300R does not compile: %.1000S", pattern,
                 cause);
    py_set_cause(cause);
}

int
py_regex_new(py_state *state, PyObject *pattern, const char *what, tp_regex **out)
{
    const char *text = NULL;
    tp_error err = TP_NO_ERROR;
    if (py_read_text(pattern, what, &text) < 0)
        return -1;
    if (tp_regex_check_size(text, &err) < 0) {
        py_raise(&err);
        return -1;
    }
    PyObject *compiled = PyObject_CallFunctionObjArgs(state->re_compile, pattern, NULL);
    if (compiled == NULL) {
        refuse_pattern(state, pattern);
        return -1;
    }
    PyObject *match = PyObject_GetAttrString(compiled, "match");
    Py_DECREF(compiled);
    if (match == NULL)
        return -1;

    const tp_matcher fallback = {match, fallback_match, fallback_release};
    if (tp_regex_new(text, &fallback, out, &err) < 0) { /* `match` is stolen */
        py_raise(&err);
        return -1;
    }
    return 0;
}

static PyObject *
pattern_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"pattern", NULL};
    PyObject *pattern = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Pattern", (char **)names,
                                     &pattern))
        return NULL;
    PyObject *self = PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    if (py_regex_new(PyType_GetModuleState(type), pattern, "pattern",
                     &((py_pattern *)self)->regex) < 0)
        Py_CLEAR(self);
    return self;
}

static void
pattern_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    tp_regex_free(((py_pattern *)self)->regex);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *
pattern_match(PyObject *self, PyObject *subject)
{
    if (!PyUnicode_Check(subject)) {
        py_wrong_type(subject, "subject", "a str");
        return NULL;
    }
    Py_ssize_t size = 0;
    const char *data = PyUnicode_AsUTF8AndSize(subject, &size);
    if (data == NULL)
        return NULL; /* UnicodeEncodeError, which is a ValueError */
    tp_error err = TP_NO_ERROR;
    bool matched = false;
    const tp_subject text = tp_subject_of(data, (size_t)size);
    if (tp_regex_match(((py_pattern *)self)->regex, &text, &matched, &err) < 0)
        return py_raise(&err);
    return PyBool_FromLong(matched);
}

static PyObject *
pattern_get_pattern(PyObject *self, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(tp_regex_pattern(((py_pattern *)self)->regex));
}

static PyObject *
pattern_get_native(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(tp_regex_is_native(((py_pattern *)self)->regex));
}

static PyObject *
pattern_repr(PyObject *self)
{
    PyObject *text = pattern_get_pattern(self, NULL);
    PyObject *repr = text == NULL ? NULL : PyUnicode_FromFormat("Pattern(%R)", text);
    Py_XDECREF(text);
    return repr;
}

static PyMethodDef methods[] = {
    {"match", pattern_match, METH_O,
     "match($self, subject, /)\n--\n\n"
     "Whether ``re.match`` finds the pattern at the start of ``subject``.\n\n"
     "ValueError for a pattern that backtracks without end."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"pattern", pattern_get_pattern, NULL, "The pattern as given.", NULL},
    {"native", pattern_get_native, NULL,
     "Whether PCRE2 decides; otherwise Python's re does.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)"Pattern(pattern)\n--\n\n"
                        "A pattern with the results of ``re.match``.\n\n"
                        "ValueError if ``re.compile`` refuses it."},
    {Py_tp_new, PY_SLOT(pattern_new)},
    {Py_tp_dealloc, PY_SLOT(pattern_dealloc)},
    {Py_tp_repr, PY_SLOT(pattern_repr)},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

const PyType_Spec py_pattern_spec = {
    .name = "deepspeed_autotp._core.Pattern",
    .basicsize = sizeof(py_pattern),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
