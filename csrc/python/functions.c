/* SPDX-License-Identifier: Apache-2.0 */
/* functions.c -- the functions of the module that belong to no type. */
#include "python/module.h"

#include <string.h>

#include "core/base/did_you_mean.h"
#include "core/base/dtype.h"
#include "core/config/merge_recorded_args.h"
#include "core/layout/split.h"
#include "core/model/names.h"
#include "core/rules/hf_tp_plan.h"
#include "core/rules/preset.h"
#include "python/args.h"
#include "python/spec.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* More ranks than any machine has; keeps a typing error from taking memory. */
#define MAX_RANKS (1 << 20)

typedef int (*splitter)(int64_t, int64_t, int, int64_t *, tp_error *);

static PyObject *
split_widths(splitter function, int64_t size, int64_t unit, int ranks)
{
    PyObject *result = NULL;
    tp_error err = TP_NO_ERROR;
    if (ranks > MAX_RANKS) {
        PyErr_Format(PyExc_ValueError, "ranks: %d is more than %d", ranks, MAX_RANKS);
        return NULL;
    }
    int64_t *widths = PyMem_Calloc(ranks > 0 ? (size_t)ranks : 1, sizeof(*widths));
    if (widths == NULL)
        return PyErr_NoMemory();
    if (function(size, unit, ranks, widths, &err) < 0)
        py_raise(&err);
    else
        result = py_int_tuple(widths, ranks);
    PyMem_Free(widths);
    return result;
}

/* `format` is PyArg_ParseTupleAndKeywords's; `unit` names the second argument. */
static PyObject *
split_with(splitter function, PyObject *args, PyObject *kwargs, const char *format,
           const char *unit)
{
    const char *const names[] = {"size", unit, "ranks", NULL};
    PyObject *size_arg, *unit_arg, *ranks_arg;
    int64_t size = 0, unit_size = 0;
    int ranks = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, (char **)names, &size_arg,
                                     &unit_arg, &ranks_arg) ||
        py_read_int64(size_arg, "size", &size) < 0 ||
        py_read_int64(unit_arg, unit, &unit_size) < 0 ||
        py_read_int(ranks_arg, "ranks", &ranks) < 0)
        return NULL;
    return split_widths(function, size, unit_size, ranks);
}

const char py_split_doc[] =
    "split(size, unit, ranks)\n--\n\n"
    "Widths per rank, each a multiple of ``unit``; earlier ranks take the "
    "remainder.\n\n"
    "ValueError unless ``unit`` divides ``size``.";

PyObject *
py_split(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    return split_with(tp_split, args, kwargs, "OOO:split", "unit");
}

const char py_split_grain_doc[] =
    "split_grain(size, grain, ranks)\n--\n\n"
    "Widths per rank in multiples of ``grain`` where that is possible.\n\n"
    "ValueError when there are more ranks than elements.";

PyObject *
py_split_grain(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    return split_with(tp_split_grain, args, kwargs, "OOO:split_grain", "grain");
}

/* New tuple of the names at `found`. */
static PyObject *
pick(const py_texts *names, const int *found, int count)
{
    PyObject *result = PyTuple_New(count);
    for (int i = 0; result != NULL && i < count; i++) {
        PyObject *name = PyTuple_GetItem(names->owner, found[i]); /* borrowed */
        PyTuple_SetItem(result, i, Py_NewRef(name));
    }
    return result;
}

const char py_index_pattern_doc[] =
    "index_pattern(name, /)\n--\n\n"
    "A dotted name with ``*`` for each index, as in ``layers.*.mlp``.";

PyObject *
py_index_pattern(PyObject *module, PyObject *object)
{
    (void)module;
    const char *name = NULL;
    if (py_read_text(object, "name", &name) < 0)
        return NULL;
    char *pattern = PyMem_Malloc(strlen(name) + 1);
    if (pattern == NULL)
        return PyErr_NoMemory();
    tp_names_pattern(name, pattern);
    PyObject *result = PyUnicode_FromString(pattern);
    PyMem_Free(pattern);
    return result;
}

const char py_nearest_doc[] =
    "nearest(name, names, limit=3)\n--\n\n"
    "The names close to ``name``, nearest first, at most ``limit``.";

PyObject *
py_nearest(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static const char *const keys[] = {"name", "names", "limit", NULL};
    PyObject *name_arg, *names_arg, *limit_arg = NULL, *result = NULL;
    const char *name = NULL;
    int limit = 3;
    int *found = NULL;
    py_texts names = PY_NO_TEXTS;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O:nearest", (char **)keys,
                                     &name_arg, &names_arg, &limit_arg) ||
        py_read_int(limit_arg, "limit", &limit) < 0)
        return NULL;
    if (py_read_text(name_arg, "name", &name) < 0) {
        if (!PyErr_ExceptionMatches(PyExc_ValueError))
            return NULL;
        PyErr_Clear(); /* nothing is near what C cannot hold */
        return PyTuple_New(0);
    }
    if (limit < 0) {
        PyErr_Format(PyExc_ValueError, "limit: %d is negative", limit);
        return NULL;
    }
    if (py_texts_read(&names, names_arg, "names") < 0)
        goto done;
    if (limit > names.count)
        limit = names.count;
    found = PyMem_Calloc((size_t)limit + 1, sizeof(*found));
    if (found == NULL)
        PyErr_NoMemory();
    else
        result = pick(&names, found,
                      tp_did_you_mean(name, names.items, names.count, limit, found));
done:
    PyMem_Free(found);
    py_texts_clear(&names);
    return result;
}

const char py_dtype_name_doc[] =
    "dtype_name(spelling, where)\n--\n\n"
    "torch's name of a data type, without the prefix: ``bfloat16`` for ``bf16``.\n\n"
    "ValueError, starting with ``where``, for an unknown spelling.";

PyObject *
py_dtype_name(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static const char *const names[] = {"spelling", "where", NULL};
    PyObject *spelling_arg, *where_arg;
    const char *spelling = NULL, *where = NULL, *name = NULL;
    tp_error err = TP_NO_ERROR;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:dtype_name", (char **)names,
                                     &spelling_arg, &where_arg) ||
        py_read_text(where_arg, "where", &where) < 0 ||
        py_read_text(spelling_arg, where, &spelling) < 0)
        return NULL;
    if (tp_dtype_name(spelling, where, &name, &err) < 0)
        return py_raise(&err);
    return PyUnicode_FromString(name);
}

const char py_precision_doc[] =
    "precision(bf16, fp16)\n--\n\n"
    "``bfloat16``, ``float16`` or None, from the two switches; bf16 wins.";

PyObject *
py_precision(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static const char *const names[] = {"bf16", "fp16", NULL};
    PyObject *bf16_arg, *fp16_arg;
    bool bf16 = false, fp16 = false;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:precision", (char **)names,
                                     &bf16_arg, &fp16_arg) ||
        py_read_flag(bf16_arg, "bf16", &bf16) < 0 ||
        py_read_flag(fp16_arg, "fp16", &fp16) < 0)
        return NULL;
    return Py_BuildValue("z", tp_merge_precision(bf16, fp16));
}

const char py_style_names_doc[] =
    "style_names()\n--\n\n"
    "The names of the styles of transformers plans, old and new.";

PyObject *
py_style_names(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    int count = 0;
    while (tp_hf_plan_style_name(count) != NULL)
        count++;
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i, PyUnicode_FromString(tp_hf_plan_style_name(i)));
    return tuple;
}

const char py_style_spec_doc[] =
    "style_spec(style, pattern)\n--\n\n"
    "The specification behind a style of a transformers plan.\n\n"
    "ValueError, naming ``pattern``, for an unknown style.";

PyObject *
py_style_spec(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static const char *const names[] = {"style", "pattern", NULL};
    PyObject *style_arg, *pattern_arg;
    const char *style = NULL, *pattern = NULL;
    tp_spec spec = TP_NO_SPEC;
    tp_error err = TP_NO_ERROR;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:style_spec", (char **)names,
                                     &style_arg, &pattern_arg) ||
        py_read_text(style_arg, "style", &style) < 0 ||
        py_read_text(pattern_arg, "pattern", &pattern) < 0)
        return NULL;
    if (tp_hf_plan_spec(style, pattern, &spec, &err) < 0)
        return py_raise(&err);
    return py_spec_dict(&spec);
}

const char py_check_spec_doc[] =
    "check_spec(spec, where)\n--\n\n"
    "Check a specification and return it with every key.\n\n"
    "Keys: partition_type, partition_dim, shape, gather_output, split_input,\n"
    "sum_gradient. Missing keys take their default, unknown keys are a ValueError.\n"
    "Messages start with ``where``.";

PyObject *
py_check_spec(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static const char *const names[] = {"spec", "where", NULL};
    PyObject *spec_arg, *where_arg;
    const char *where = NULL;
    tp_spec spec;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:check_spec", (char **)names,
                                     &spec_arg, &where_arg) ||
        py_read_text(where_arg, "where", &where) < 0 ||
        py_spec_read(spec_arg, where, &spec) < 0)
        return NULL;
    return py_spec_dict(&spec);
}

const char py_core_info_doc[] =
    "core_info()\n--\n\n"
    "What the core was built with: ``{\"pcre2\": version, \"jit\": bool}``.";

PyObject *
py_core_info(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    char version[64] = ""; /* PCRE2 asks for at least 24 */
    uint32_t jit = 0;
    pcre2_config(PCRE2_CONFIG_VERSION, version);
    pcre2_config(PCRE2_CONFIG_JIT, &jit);
    return Py_BuildValue("{sssO}", "pcre2", version, "jit", jit ? Py_True : Py_False);
}
