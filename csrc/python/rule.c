/* SPDX-License-Identifier: Apache-2.0 */
/* rule.c -- one rule from Python values.
 *
 * What a rule owns is taken with malloc, because the core releases it. */
#include "python/rule.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/did_you_mean.h"
#include "python/args.h"
#include "python/pattern.h"
#include "python/spec.h"

static int
read_source(PyObject *object, tp_source *out)
{
    const char *name = NULL;
    const char *known[TP_FROM_NOTHING];
    if (object == NULL)
        return 0;
    if (py_read_text(object, "source", &name) < 0)
        return -1;
    for (int i = 0; i < TP_FROM_NOTHING; i++) {
        known[i] = tp_source_name((tp_source)i);
        if (strcmp(name, known[i]) == 0) {
            *out = (tp_source)i;
            return 0;
        }
    }
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "source: unknown source '%s'", name);
    tp_did_you_mean_add(&text, name, known, TP_FROM_NOTHING);
    tp_text_fail(&text, TP_VALUE, &err);
    py_raise(&err);
    return -1;
}

static int
compile_patterns(py_state *state, PyObject *patterns, tp_rule *rule)
{
    int result = -1;
    PyObject *items = py_read_sequence(patterns, "patterns");
    if (items == NULL)
        return -1;
    const Py_ssize_t count = PyTuple_Size(items);
    if (count == 0) {
        PyErr_SetString(PyExc_ValueError, "patterns: the list is empty");
        goto done;
    }
    rule->patterns = calloc((size_t)count, sizeof(*rule->patterns));
    if (rule->patterns == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GetItem(items, i); /* borrowed */
        if (py_regex_new(state, item, NULL, &rule->patterns[i]) < 0) {
            py_raised_at("patterns[%zd]", i);
            goto done;
        }
        rule->pattern_count++;
    }
    result = 0;
done:
    Py_DECREF(items);
    return result;
}

static int
copy_model_types(PyObject *model_types, tp_rule *rule)
{
    int result = -1;
    py_texts types = PY_NO_TEXTS;
    if (model_types == NULL)
        return 0;
    if (py_texts_read(&types, model_types, "model_types") < 0)
        goto done;
    rule->model_types = calloc((size_t)types.count + 1, sizeof(*rule->model_types));
    if (rule->model_types == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (int i = 0; i < types.count; i++) {
        rule->model_types[i] = strdup(types.items[i]);
        if (rule->model_types[i] == NULL) {
            PyErr_NoMemory();
            goto done;
        }
        rule->model_type_count++;
    }
    result = 0;
done:
    py_texts_clear(&types);
    return result;
}

static int
fill(py_state *state, const py_rule_arguments *given, tp_rule *rule)
{
    const char *label = NULL;
    rule->source = TP_FROM_CONFIG;
    if (py_read_text(given->label, "label", &label) < 0)
        return -1;
    if (py_spec_read(given->spec, label, &rule->spec) < 0)
        return -1;
    if (read_source(given->source, &rule->source) < 0 ||
        compile_patterns(state, given->patterns, rule) < 0 ||
        copy_model_types(given->model_types, rule) < 0)
        return py_raised_at("%s", label);
    rule->label = strdup(label);
    if (rule->label == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

int
py_rule_build(py_state *state, const py_rule_arguments *given, tp_rule *rule)
{
    memset(rule, 0, sizeof(*rule));
    if (fill(state, given, rule) == 0)
        return 0;
    tp_rule_clear(rule);
    return -1;
}
