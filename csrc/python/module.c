/* SPDX-License-Identifier: Apache-2.0 */
/* module.c -- the module `_core`: its method table, its types and its state.
 *
 * Nothing is computed here. */
#include "python/module.h"

#include "python/enums.h"

static PyMethodDef methods[] = {
    {"split", PY_KEYWORDS(py_split), METH_VARARGS | METH_KEYWORDS, py_split_doc},
    {"split_grain", PY_KEYWORDS(py_split_grain), METH_VARARGS | METH_KEYWORDS,
     py_split_grain_doc},
    {"index_pattern", py_index_pattern, METH_O, py_index_pattern_doc},
    {"nearest", PY_KEYWORDS(py_nearest), METH_VARARGS | METH_KEYWORDS, py_nearest_doc},
    {"dtype_name", PY_KEYWORDS(py_dtype_name), METH_VARARGS | METH_KEYWORDS,
     py_dtype_name_doc},
    {"precision", PY_KEYWORDS(py_precision), METH_VARARGS | METH_KEYWORDS,
     py_precision_doc},
    {"family_blocks", py_family_blocks, METH_NOARGS, py_family_blocks_doc},
    {"preset_names", py_preset_names, METH_NOARGS, py_preset_names_doc},
    {"preset_rows", py_preset_rows, METH_O, py_preset_rows_doc},
    {"style_names", py_style_names, METH_NOARGS, py_style_names_doc},
    {"style_spec", PY_KEYWORDS(py_style_spec), METH_VARARGS | METH_KEYWORDS,
     py_style_spec_doc},
    {"check_spec", PY_KEYWORDS(py_check_spec), METH_VARARGS | METH_KEYWORDS,
     py_check_spec_doc},
    {"core_info", py_core_info, METH_NOARGS, py_core_info_doc},
    {"merge", PY_KEYWORDS(py_merge), METH_VARARGS | METH_KEYWORDS, py_merge_doc},
    {"settle_tp_size", py_settle_tp_size, METH_O, py_settle_tp_size_doc},
    {"plan_reads", PY_KEYWORDS(py_plan_reads), METH_VARARGS | METH_KEYWORDS,
     py_plan_reads_doc},
    {"reshard", PY_KEYWORDS(py_reshard), METH_VARARGS | METH_KEYWORDS, py_reshard_doc},
    {"optimizer_states", py_optimizer_states, METH_O, py_optimizer_states_doc},
    {"collective_seconds", py_collective_seconds, METH_VARARGS,
     py_collective_seconds_doc},
    {"order_layouts", py_order_layouts, METH_VARARGS, py_order_layouts_doc},
    {"activation_formula", py_activation_formula, METH_VARARGS,
     py_activation_formula_doc},
    {"timeline_peak", py_timeline_peak, METH_VARARGS, py_timeline_peak_doc},
    {NULL, NULL, 0, NULL},
};

/* `name` is NULL for a type that Python code never sees. */
static const struct {
    const char *name;
    const PyType_Spec *spec;
} types[PY_TYPE_COUNT] = {
    [PY_PATTERN] = {"Pattern", &py_pattern_spec},
    [PY_RECORDS] = {"Records", &py_records_spec},
    [PY_RULES] = {"Rules", &py_rules_spec},
    [PY_MODEL] = {"Model", &py_model_spec},
    [PY_HOLDER] = {NULL, &py_holder_spec},
    [PY_PLAN] = {"Plan", &py_plan_spec},
    [PY_ENTRY] = {"Entry", &py_entry_spec},
    [PY_LAYER] = {"Layer", &py_layer_spec},
    [PY_INTEGER] = {"LocalInteger", &py_integer_spec},
    [PY_STACK] = {"Stack", &py_stack_spec},
    [PY_ROW] = {"Row", &py_row_spec},
};

py_state *
py_state_of(PyObject *self)
{
    return PyType_GetModuleState(Py_TYPE(self));
}

static int
add_name(PyObject *names, const char *name)
{
    PyObject *text = PyUnicode_FromString(name);
    const int result = text == NULL ? -1 : PyList_Append(names, text);
    Py_XDECREF(text);
    return result;
}

/* __all__ is made from the tables, so that it cannot disagree with them. */
static int
add_all(PyObject *module)
{
    int result = -1;
    PyObject *names = PyList_New(0);
    if (names == NULL)
        goto done;
    for (int i = 0; i < PY_TYPE_COUNT; i++)
        if (types[i].name != NULL && add_name(names, types[i].name) < 0)
            goto done;
    for (const PyMethodDef *method = methods; method->ml_name != NULL; method++)
        if (add_name(names, method->ml_name) < 0)
            goto done;
    for (int i = 0; py_enum_names[i] != NULL; i++)
        if (add_name(names, py_enum_names[i]) < 0)
            goto done;
    result = PyModule_AddObjectRef(module, "__all__", names);
done:
    Py_XDECREF(names);
    return result;
}

static int
add_types(PyObject *module, py_state *state)
{
    for (int i = 0; i < PY_TYPE_COUNT; i++) {
        PyObject *type =
            PyType_FromModuleAndSpec(module, (PyType_Spec *)types[i].spec, NULL);
        if (type == NULL)
            return -1;
        state->types[i] = (PyTypeObject *)type;
        if (types[i].name != NULL && PyModule_AddType(module, state->types[i]) < 0)
            return -1;
    }
    return 0;
}

static int
module_exec(PyObject *module)
{
    py_state *state = PyModule_GetState(module);
    PyObject *re = PyImport_ImportModule("re");
    if (re == NULL)
        return -1;
    state->re_compile = PyObject_GetAttrString(re, "compile");
    state->re_error = PyObject_GetAttrString(re, "error");
    Py_DECREF(re);
    if (state->re_compile == NULL || state->re_error == NULL)
        return -1;
    if (add_types(module, state) < 0 || py_enums_add(module, state) < 0)
        return -1;
    return add_all(module);
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    py_state *state = PyModule_GetState(module);
    for (int i = 0; i < PY_TYPE_COUNT; i++)
        Py_VISIT(state->types[i]);
    Py_VISIT(state->re_compile);
    Py_VISIT(state->re_error);
    Py_VISIT(state->kinds);
    Py_VISIT(state->sources);
    return 0;
}

static int
module_clear(PyObject *module)
{
    py_state *state = PyModule_GetState(module);
    for (int i = 0; i < PY_TYPE_COUNT; i++)
        Py_CLEAR(state->types[i]);
    Py_CLEAR(state->re_compile);
    Py_CLEAR(state->re_error);
    Py_CLEAR(state->kinds);
    Py_CLEAR(state->sources);
    return 0;
}

static void
module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, PY_SLOT(module_exec)},
    {0, NULL},
};

/* CPython writes into the definition, hence no const. */
static PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "deepspeed_autotp._core",
    .m_doc = "The C core: everything that can be decided without a tensor.",
    .m_size = sizeof(py_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
