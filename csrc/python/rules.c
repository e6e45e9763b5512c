/* SPDX-License-Identifier: Apache-2.0 */
/* rules.c -- the type Rules: ordered rules, earlier ones win. */
#include "python/rules.h"

#include "python/args.h"
#include "python/rule.h"

typedef struct {
    PyObject_HEAD tp_rules *rules; /* owned */
    int readers;                   /* calls that read the rules right now */
} py_rules;

static tp_rules *
get(PyObject *self)
{
    return ((py_rules *)self)->rules;
}

const tp_rules *
py_rules_hold(PyObject *rules)
{
    ((py_rules *)rules)->readers++;
    return get(rules);
}

void
py_rules_release(PyObject *rules)
{
    ((py_rules *)rules)->readers--;
}

/* Adding moves the rules in memory. */
static int
check_writable(PyObject *self)
{
    if (((py_rules *)self)->readers == 0)
        return 0;
    PyErr_SetString(PyExc_RuntimeError,
                    "Rules: cannot add while a plan reads the rules");
    return -1;
}

static PyObject *
rules_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Rules", (char **)names))
        return NULL;
    PyObject *self = PyType_GenericAlloc(type, 0);
    tp_error err = TP_NO_ERROR;
    if (self != NULL && tp_rules_new(&((py_rules *)self)->rules, &err) < 0) {
        py_raise(&err);
        Py_CLEAR(self);
    }
    return self;
}

static void
rules_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    tp_rules_free(get(self));
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *
rules_add(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"patterns",    "spec",   "label",
                                        "model_types", "source", NULL};
    py_rule_arguments given = {0};
    tp_rule rule;
    tp_error err = TP_NO_ERROR;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$OOO:add", (char **)names,
                                     &given.patterns, &given.spec, &given.label,
                                     &given.model_types, &given.source) ||
        py_check_required(given.label, "label") < 0 ||
        py_rule_build(py_state_of(self), &given, &rule) < 0)
        return NULL;
    if (check_writable(self) < 0) {
        tp_rule_clear(&rule);
        return NULL;
    }
    if (tp_rules_add(get(self), &rule, &err) < 0) /* `rule` is stolen */
        return py_raise(&err);
    Py_RETURN_NONE;
}

static PyObject *
rules_add_preset(PyObject *self, PyObject *name)
{
    const char *text = NULL;
    tp_error err = TP_NO_ERROR;
    if (py_read_text(name, "name", &text) < 0 || check_writable(self) < 0)
        return NULL;
    if (tp_rules_add_preset(get(self), text, &err) < 0)
        return py_raise(&err);
    Py_RETURN_NONE;
}

static PyObject *
rules_add_style(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"pattern", "style", "required", NULL};
    PyObject *pattern_arg, *style_arg;
    const char *pattern = NULL, *style = NULL;
    int required = 0;
    tp_error err = TP_NO_ERROR;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$p:add_style", (char **)names,
                                     &pattern_arg, &style_arg, &required) ||
        py_read_text(pattern_arg, "pattern", &pattern) < 0 ||
        py_read_text(style_arg, "style", &style) < 0 || check_writable(self) < 0)
        return NULL;
    if (tp_rules_add_style(get(self), pattern, style, required, &err) < 0)
        return py_raise(&err);
    Py_RETURN_NONE;
}

static PyObject *
find(PyObject *self, const tp_query *query)
{
    PyObject *result = NULL;
    tp_error err = TP_NO_ERROR;
    const int room = tp_rules_count(get(self));
    int *found = PyMem_Calloc((size_t)room + 1, sizeof(*found));
    if (found == NULL)
        return PyErr_NoMemory();
    const int count = tp_rules_find(py_rules_hold(self), query, found, room, &err);
    py_rules_release(self);
    if (count < 0)
        py_raise(&err);
    else
        result = PyTuple_New(count);
    for (int i = 0; result != NULL && i < count; i++)
        py_tuple_put(&result, i, PyLong_FromLong(found[i]));
    PyMem_Free(found);
    return result;
}

static PyObject *
rules_find(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"parameter", "module", "model_type", "prefix",
                                        NULL};
    PyObject *parameter_arg, *module_arg = NULL, *type_arg = NULL, *prefix_arg = NULL;
    tp_query query = {.prefix = ""};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OOO:find", (char **)names,
                                     &parameter_arg, &module_arg, &type_arg,
                                     &prefix_arg) ||
        py_read_text(parameter_arg, "parameter", &query.parameter) < 0 ||
        py_read_optional_text(module_arg, "module", &query.module) < 0 ||
        py_read_optional_text(type_arg, "model_type", &query.model_type) < 0)
        return NULL;
    if (prefix_arg != NULL && py_read_text(prefix_arg, "prefix", &query.prefix) < 0)
        return NULL;
    return find(self, &query);
}

static Py_ssize_t
rules_length(PyObject *self)
{
    return tp_rules_count(get(self));
}

static PyMethodDef methods[] = {
    {"add", PY_KEYWORDS(rules_add), METH_VARARGS | METH_KEYWORDS,
     "add($self, patterns, spec, *, label, model_types=(), source='partition_config')\n"
     "--\n\n"
     "Append a rule: ``spec`` for the names that one of ``patterns`` matches.\n\n"
     "``model_types`` limits the rule to some models. Messages start with ``label``."},
    {"add_preset", rules_add_preset, METH_O,
     "add_preset($self, name, /)\n--\n\n"
     "Append the rows of a preset, one rule each."},
    {"add_style", PY_KEYWORDS(rules_add_style), METH_VARARGS | METH_KEYWORDS,
     "add_style($self, pattern, style, *, required=False)\n--\n\n"
     "Append one entry of a transformers plan."},
    {"find", PY_KEYWORDS(rules_find), METH_VARARGS | METH_KEYWORDS,
     "find($self, parameter, module=None, model_type=None, prefix='')\n--\n\n"
     "The indices of the rules that match, in order."},
    {NULL, NULL, 0, NULL},
};

static PyObject *
rules_get_only_skip(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(tp_rules_only_skip(get(self)));
}

static PyGetSetDef getters[] = {
    {"only_skip", rules_get_only_skip, NULL,
     "Whether there are rules, and all of them skip what they match.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)"Rules()\n--\n\nOrdered rules; earlier ones win."},
    {Py_tp_new, PY_SLOT(rules_new)},
    {Py_tp_dealloc, PY_SLOT(rules_dealloc)},
    {Py_sq_length, PY_SLOT(rules_length)},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

const PyType_Spec py_rules_spec = {
    .name = "deepspeed_autotp._core.Rules",
    .basicsize = sizeof(py_rules),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
