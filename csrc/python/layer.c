/* SPDX-License-Identifier: Apache-2.0 */
/* layer.c -- the type Layer: one module whose forward changes. */
#include "python/args.h"

#include "core/plan/layer_facts.h"
#include "python/enums.h"
#include "python/holder.h"

static const tp_layer *
get(PyObject *self)
{
    return tp_plan_layer(py_view_plan(self), ((py_view *)self)->index);
}

static PyObject *
layer_get_module(PyObject *self, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(
        tp_model_module(py_view_model(self), get(self)->module)->name);
}

static PyObject *
layer_get_kind(PyObject *self, void *closure)
{
    (void)closure;
    return py_kind(py_state_of(self), get(self)->kind);
}

static PyObject *
layer_get_weight(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLong(get(self)->weight);
}

static PyObject *
layer_get_bias(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLong(get(self)->bias);
}

static PyObject *
layer_get_gather_output(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(get(self)->gather_output);
}

static PyObject *
layer_get_split_input(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(get(self)->split_input);
}

static PyObject *
layer_get_opens_region(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(get(self)->opens_region);
}

static PyObject *
layer_get_closes_region(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(get(self)->closes_region);
}

static PyObject *
index_tuple(const int *indices, int count)
{
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i, PyLong_FromLong(indices[i]));
    return tuple;
}

static PyObject *
layer_get_is_large(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(get(self)->is_large);
}

static PyObject *
layer_get_divided(PyObject *self, void *closure)
{
    (void)closure;
    return index_tuple(get(self)->divided, get(self)->divided_count);
}

static PyObject *
layer_get_siblings(PyObject *self, void *closure)
{
    (void)closure;
    return index_tuple(get(self)->siblings, get(self)->sibling_count);
}

static PyObject *
layer_get_features(PyObject *self, void *closure)
{
    (void)closure;
    tp_features features;
    tp_layer_features(py_view_plan(self), ((py_view *)self)->index, &features);
    const int ranks = features.size == 0 ? 0 : tp_plan_ranks(py_view_plan(self));
    PyObject *result = NULL;
    PyObject *widths = PyTuple_New(ranks);
    PyObject *runs = PyTuple_New(ranks);
    for (int rank = 0; widths != NULL && runs != NULL && rank < ranks; rank++) {
        const tp_shard one = {&features.run, 1, features.run.length};
        const tp_shard *shard =
            features.layout == NULL ? &one : &features.layout->shards[rank];
        py_tuple_put(&widths, rank, PyLong_FromLongLong(shard->width));
        py_tuple_put(&runs, rank, py_runs_tuple(shard->runs, shard->count));
    }
    if (widths != NULL && runs != NULL)
        result = Py_BuildValue("LOO", (long long)features.size, widths, runs);
    Py_XDECREF(widths);
    Py_XDECREF(runs);
    return result;
}

static PyObject *
layer_get_has_full_output(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(tp_layer_has_full_output(get(self)));
}

static PyObject *
layer_get_gathers_weight(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(tp_layer_gathers_weight(get(self)));
}

static PyObject *
layer_get_is_heuristic(PyObject *self, void *closure)
{
    (void)closure;
    const int index = ((py_view *)self)->index;
    return PyBool_FromLong(tp_layer_is_heuristic(py_view_plan(self), index));
}

static PyObject *
layer_get_block(PyObject *self, void *closure)
{
    (void)closure;
    tp_error err = TP_NO_ERROR;
    tp_arena *arena = NULL;
    tp_names names;
    PyObject *tuple = NULL;
    if (tp_arena_new(&arena, &err) < 0 ||
        tp_layer_block(py_view_plan(self), ((py_view *)self)->index, arena, &names,
                       &err) < 0) {
        py_raise(&err);
        goto done;
    }
    tuple = PyTuple_New(names.count);
    for (int i = 0; tuple != NULL && i < names.count; i++)
        py_tuple_put(&tuple, i, PyUnicode_FromString(names.names[i]));
done:
    tp_arena_free(arena);
    return tuple;
}

static PyObject *
layer_repr(PyObject *self)
{
    const tp_layer *layer = get(self);
    return PyUnicode_FromFormat(
        "<Layer %s %s>", tp_model_module(py_view_model(self), layer->module)->name,
        tp_kind_name(layer->kind));
}

static PyGetSetDef getters[] = {
    {"module", layer_get_module, NULL, "Name of the module.", NULL},
    {"kind", layer_get_kind, NULL,
     "What its forward does, one of the members of Kind from COLUMN on.", NULL},
    {"weight", layer_get_weight, NULL, "Index of the weight's entry, or -1.", NULL},
    {"bias", layer_get_bias, NULL, "Index of the bias's entry, or -1.", NULL},
    {"gather_output", layer_get_gather_output, NULL,
     "Whether every rank gets the full output.", NULL},
    {"split_input", layer_get_split_input, NULL,
     "Whether the input is full and each rank takes its features.", NULL},
    {"opens_region", layer_get_opens_region, NULL,
     "Whether each rank has its own features behind it.", NULL},
    {"closes_region", layer_get_closes_region, NULL,
     "Whether it is given these features.", NULL},
    {"is_large", layer_get_is_large, NULL,
     "Whether it is a large layer that nothing else shards, sharded individually.",
     NULL},
    {"divided", layer_get_divided, NULL,
     "Indices of the entries of which each rank adds its share.", NULL},
    {"siblings", layer_get_siblings, NULL,
     "Indices of the layers that are likely to be given the same input.", NULL},
    {"features", layer_get_features, NULL,
     "Of the sharded dimension: its size, and the widths and runs of each rank.", NULL},
    {"has_full_output", layer_get_has_full_output, NULL,
     "Whether every rank has its full output.", NULL},
    {"gathers_weight", layer_get_gathers_weight, NULL,
     "Whether who reads its weight outside of its forward expects the full one.", NULL},
    {"is_heuristic", layer_get_is_heuristic, NULL,
     "Whether names or sizes alone say to shard it, in a model of an untried type.",
     NULL},
    {"block", layer_get_block, NULL,
     "Names of the modules to plan anew where it is wrong, with * for each index.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)"One module whose forward changes; read-only."},
    {Py_tp_dealloc, PY_SLOT(py_view_dealloc)},
    {Py_tp_repr, PY_SLOT(layer_repr)},
    {Py_tp_getset, getters},
    {0, NULL},
};

const PyType_Spec py_layer_spec = {
    .name = "deepspeed_autotp._core.Layer",
    .basicsize = sizeof(py_view),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
