/* SPDX-License-Identifier: Apache-2.0 */
/* module.h -- what the files of the module `_core` share.
 *
 * The module's state, the list of its types and the functions behind its method
 * table. The module keeps no value outside this state.
 *
 * Python.h comes first, before any header of libc, so this one does, too.
 *
 * Instances do not take part in garbage collection: they refer only to strings,
 * integers and to each other in one direction (Row -> Entry -> holder -> Model,
 * Rules), so no cycle can go through them. */
#ifndef PY_MODULE_H
#define PY_MODULE_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>

typedef enum {
    PY_PATTERN,
    PY_RECORDS,
    PY_RULES,
    PY_MODEL,
    PY_HOLDER,
    PY_PLAN,
    PY_ENTRY,
    PY_LAYER,
    PY_INTEGER,
    PY_STACK,
    PY_ROW,
    PY_TYPE_COUNT
} py_type;

typedef struct {
    PyTypeObject *types[PY_TYPE_COUNT]; /* strong */
    PyObject *re_compile;               /* strong: re.compile */
    PyObject *re_error;                 /* strong: re.error */
    PyObject *kinds;                    /* strong: tuple of Kind's members */
    PyObject *sources;                  /* strong: tuple of Source's members */
} py_state;

extern const PyType_Spec py_pattern_spec;
extern const PyType_Spec py_records_spec;
extern const PyType_Spec py_rules_spec;
extern const PyType_Spec py_model_spec;
extern const PyType_Spec py_holder_spec;
extern const PyType_Spec py_plan_spec;
extern const PyType_Spec py_entry_spec;
extern const PyType_Spec py_layer_spec;
extern const PyType_Spec py_integer_spec;
extern const PyType_Spec py_stack_spec;
extern const PyType_Spec py_row_spec;

/* Every type is final, so an instance's type is the one the module made. */
py_state *py_state_of(PyObject *self);

/* Functions take (args, kwargs) unless they take one argument or none. */
#define PY_KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))

/* Slots hold functions as void pointers, which ISO C has no conversion for. */
#define PY_SLOT(function) ((void *)(uintptr_t)(function))

PyObject *py_split(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_split_grain(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_index_pattern(PyObject *module, PyObject *name);
PyObject *py_nearest(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_dtype_name(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_precision(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_family_blocks(PyObject *module, PyObject *unused);
PyObject *py_preset_names(PyObject *module, PyObject *unused);
PyObject *py_preset_rows(PyObject *module, PyObject *name);
PyObject *py_style_names(PyObject *module, PyObject *unused);
PyObject *py_style_spec(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_check_spec(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_core_info(PyObject *module, PyObject *unused);
PyObject *py_merge(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_settle_tp_size(PyObject *module, PyObject *arg);
PyObject *py_plan_reads(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_reshard(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_optimizer_states(PyObject *module, PyObject *name);
PyObject *py_collective_seconds(PyObject *module, PyObject *args);
PyObject *py_order_layouts(PyObject *module, PyObject *args);
PyObject *py_activation_formula(PyObject *module, PyObject *args);
PyObject *py_timeline_peak(PyObject *module, PyObject *args);

extern const char py_split_doc[];
extern const char py_split_grain_doc[];
extern const char py_index_pattern_doc[];
extern const char py_nearest_doc[];
extern const char py_dtype_name_doc[];
extern const char py_precision_doc[];
extern const char py_family_blocks_doc[];
extern const char py_preset_names_doc[];
extern const char py_preset_rows_doc[];
extern const char py_style_names_doc[];
extern const char py_style_spec_doc[];
extern const char py_check_spec_doc[];
extern const char py_core_info_doc[];
extern const char py_merge_doc[];
extern const char py_settle_tp_size_doc[];
extern const char py_plan_reads_doc[];
extern const char py_reshard_doc[];
extern const char py_optimizer_states_doc[];
extern const char py_collective_seconds_doc[];
extern const char py_order_layouts_doc[];
extern const char py_activation_formula_doc[];
extern const char py_timeline_peak_doc[];

#endif
