/* SPDX-License-Identifier: Apache-2.0 */
/* entry.c -- the type Entry: what happens to one parameter. */
#include <stdlib.h>

#include "core/plan/blocks.h"
#include "core/plan/chunks.h"
#include "python/args.h"
#include "python/enums.h"
#include "python/holder.h"

static const tp_entry *
get(PyObject *self)
{
    return tp_plan_entry(py_view_plan(self), ((py_view *)self)->index);
}

static const tp_parameter *
get_parameter(PyObject *self)
{
    return tp_model_parameter(py_view_model(self), get(self)->parameter);
}

static PyObject *
entry_get_name(PyObject *self, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(get_parameter(self)->name);
}

static PyObject *
entry_get_kind(PyObject *self, void *closure)
{
    (void)closure;
    return py_kind(py_state_of(self), get(self)->kind);
}

static PyObject *
entry_get_source(PyObject *self, void *closure)
{
    (void)closure;
    return py_source(py_state_of(self), get(self)->source);
}

static PyObject *
entry_get_rule(PyObject *self, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(get(self)->rule);
}

static PyObject *
entry_get_shape(PyObject *self, void *closure)
{
    (void)closure;
    const tp_parameter *parameter = get_parameter(self);
    return py_int_tuple(parameter->shape, parameter->dims);
}

static PyObject *
entry_get_dim(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLong(get(self)->dim);
}

/* Along the sharded dimension; of a replicated weight, all of its elements. */
static int64_t
full_size(PyObject *self)
{
    const tp_layout *layout = get(self)->layout;
    const tp_parameter *parameter = get_parameter(self);
    int64_t elements = 1;
    for (int i = 0; i < parameter->dims; i++)
        elements *= parameter->shape[i];
    return layout == NULL ? elements : layout->size;
}

static PyObject *
entry_get_view(PyObject *self, void *closure)
{
    (void)closure;
    const tp_entry *entry = get(self);
    const int64_t view[] = {entry->outer, full_size(self), entry->inner};
    return py_int_tuple(view, 3);
}

static PyObject *
entry_get_tied_to(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLong(get_parameter(self)->tied_to);
}

static PyObject *
entry_get_is_sharded(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(get(self)->layout != NULL);
}

static PyObject *
entry_get_is_tied(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(get_parameter(self)->tied_to >= 0);
}

static int
read_rank(PyObject *self, PyObject *arg, int *rank)
{
    const int ranks = tp_plan_ranks(py_view_plan(self));
    if (py_read_int(arg, "rank", rank) < 0)
        return -1;
    if (*rank >= 0 && *rank < ranks)
        return 0;
    PyErr_Format(PyExc_ValueError, "rank: %d is not between 0 and %d", *rank,
                 ranks - 1);
    return -1;
}

static PyObject *
entry_local_shape(PyObject *self, PyObject *arg)
{
    int rank = 0;
    int64_t shape[TP_MAX_DIMS];
    if (read_rank(self, arg, &rank) < 0)
        return NULL;
    tp_plan_local_shape(py_view_plan(self), ((py_view *)self)->index, rank, shape);
    return py_int_tuple(shape, get_parameter(self)->dims);
}

static PyObject *
entry_width(PyObject *self, PyObject *arg)
{
    int rank = 0;
    if (read_rank(self, arg, &rank) < 0)
        return NULL;
    const tp_layout *layout = get(self)->layout;
    return PyLong_FromLongLong(layout == NULL ? full_size(self)
                                              : layout->shards[rank].width);
}

static PyObject *
entry_runs(PyObject *self, PyObject *arg)
{
    int rank = 0;
    if (read_rank(self, arg, &rank) < 0)
        return NULL;
    const tp_layout *layout = get(self)->layout;
    if (layout == NULL)
        return PyTuple_New(0);
    const tp_shard *shard = &layout->shards[rank];
    return py_runs_tuple(shard->runs, shard->count);
}

static PyObject *
entry_shared(PyObject *self, PyObject *arg)
{
    int rank = 0;
    int64_t offset = 0;
    PyObject *result = NULL;
    if (read_rank(self, arg, &rank) < 0)
        return NULL;
    PyObject *list = PyList_New(0);
    const tp_layout *layout = get(self)->layout;
    const tp_shard *shard = layout == NULL ? NULL : &layout->shards[rank];
    if (list == NULL)
        return NULL;
    for (int i = 0; shard != NULL && i < shard->count; i++) {
        const tp_run *run = &shard->runs[i];
        const int64_t start = offset;
        offset += run->length;
        if (run->holders <= 1)
            continue;
        PyObject *item = Py_BuildValue("LLii", (long long)start, (long long)run->length,
                                       run->owner, run->holders);
        const int appended = item == NULL ? -1 : PyList_Append(list, item);
        Py_XDECREF(item);
        if (appended < 0)
            goto done;
    }
    result = PyList_AsTuple(list);
done:
    Py_DECREF(list);
    return result;
}

static PyObject *
entry_chunks(PyObject *self, PyObject *args)
{
    int rank = 0, count = 0;
    long long begin = 0, end = 0;
    PyObject *rank_arg;
    tp_chunk *chunks = NULL;
    tp_error err = TP_NO_ERROR;
    if (!PyArg_ParseTuple(args, "OLL:chunks", &rank_arg, &begin, &end) ||
        read_rank(self, rank_arg, &rank) < 0)
        return NULL;
    if (tp_chunks(py_view_plan(self), ((py_view *)self)->index, rank, begin, end,
                  &chunks, &count, &err) < 0)
        return py_raise(&err);
    PyObject *result = PyTuple_New(count);
    for (int i = 0; result != NULL && i < count; i++)
        py_tuple_put(&result, i,
                     Py_BuildValue("LLLO", (long long)chunks[i].from,
                                   (long long)chunks[i].at, (long long)chunks[i].length,
                                   chunks[i].is_owned ? Py_True : Py_False));
    free(chunks);
    return result;
}

static PyObject *
entry_blocks(PyObject *self, PyObject *args)
{
    int rank = 0;
    long long block = 0;
    PyObject *rank_arg;
    tp_blocks blocks = {0};
    tp_error err = TP_NO_ERROR;
    if (!PyArg_ParseTuple(args, "OL:blocks", &rank_arg, &block) ||
        read_rank(self, rank_arg, &rank) < 0)
        return NULL;
    if (tp_blocks_of(py_view_plan(self), ((py_view *)self)->index, rank, block, &blocks,
                     &err) < 0)
        return py_raise(&err);
    PyObject *runs = py_runs_tuple(blocks.runs, blocks.count);
    free(blocks.runs);
    if (runs == NULL)
        return NULL;
    return Py_BuildValue("LLN", (long long)blocks.outer, (long long)blocks.size, runs);
}

static PyObject *
entry_is_counted(PyObject *self, PyObject *arg)
{
    int rank = 0;
    if (read_rank(self, arg, &rank) < 0)
        return NULL;
    const int index = ((py_view *)self)->index;
    return PyBool_FromLong(tp_plan_is_counted(py_view_plan(self), index, rank));
}

static PyObject *
entry_repr(PyObject *self)
{
    const tp_entry *entry = get(self);
    PyObject *shape = entry_get_shape(self, NULL);
    if (shape == NULL)
        return NULL;
    PyObject *repr =
        PyUnicode_FromFormat("<Entry %s %R %s by %s>", get_parameter(self)->name, shape,
                             tp_kind_name(entry->kind), tp_source_name(entry->source));
    Py_DECREF(shape);
    return repr;
}

static PyMethodDef methods[] = {
    {"local_shape", entry_local_shape, METH_O,
     "local_shape($self, rank, /)\n--\n\n"
     "Shape of the shard on ``rank``."},
    {"width", entry_width, METH_O,
     "width($self, rank, /)\n--\n\n"
     "Elements along the sharded dimension that ``rank`` holds, out of ``view[1]``; "
     "all of them "
     "when\n"
     "the parameter is replicated."},
    {"runs", entry_runs, METH_O,
     "runs($self, rank, /)\n--\n\n"
     "start, length, start, length, ... of the shard on ``rank`` along the sharded "
     "dimension, in\n"
     "elements; empty when the parameter is replicated."},
    {"shared", entry_shared, METH_O,
     "shared($self, rank, /)\n--\n\n"
     "Runs that other ranks hold, too: (offset in the shard, length, owner, "
     "holders).\n\n"
     "Ranks owner to owner + holders - 1 hold the run."},
    {"chunks", entry_chunks, METH_VARARGS,
     "chunks($self, rank, begin, end, /)\n--\n\n"
     "Where the shard on ``rank`` from ``begin`` up to ``end`` along ``dim`` is in the "
     "full "
     "parameter:\n"
     "(offset in the shard, offset in the full parameter, length, whether ``rank`` "
     "owns it),"
     "\n"
     "all along ``dim``. ValueError for a replicated parameter, and for other bounds."},
    {"blocks", entry_blocks, METH_VARARGS,
     "blocks($self, rank, block, /)\n--\n\n"
     "The shard on ``rank`` in blocks of ``block`` elements that follow one another in "
     "the full\n"
     "parameter, which is (outer, size) blocks: (outer, size, runs along size). "
     "ValueError for a\n"
     "replicated parameter, and where a block would be split."},
    {"is_counted", entry_is_counted, METH_O,
     "is_counted($self, rank, /)\n--\n\n"
     "Whether ``rank`` counts some of its shard in a sum over all ranks: it owns a run "
     "of it. False for a replicated parameter."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"name", entry_get_name, NULL, "Name of the parameter.", NULL},
    {"kind", entry_get_kind, NULL,
     "replicated, replicated+sum, skip, column, row, vocabulary or hidden.", NULL},
    {"source", entry_get_source, NULL,
     "partition_config, preset, tp_plan, family, heuristic, default or - for nothing.",
     NULL},
    {"rule", entry_get_rule, NULL, "Label of the deciding rule, or empty.", NULL},
    {"shape", entry_get_shape, NULL, "Full shape.", NULL},
    {"dim", entry_get_dim, NULL, "The dimension that shrinks; -1: replicated.", NULL},
    {"view", entry_get_view, NULL,
     "(outer, size, inner) of the full weight around the sharded dimension; (1, "
     "elements, 1) when "
     "it is replicated.",
     NULL},
    {"is_sharded", entry_get_is_sharded, NULL,
     "Whether each rank has a shard of it; replicated otherwise.", NULL},
    {"is_tied", entry_get_is_tied, NULL,
     "Whether an earlier entry has the same tensor.", NULL},
    {"tied_to", entry_get_tied_to, NULL,
     "Index of the entry whose tensor this is, or -1.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)"One parameter of a plan; read-only."},
    {Py_tp_dealloc, PY_SLOT(py_view_dealloc)},
    {Py_tp_repr, PY_SLOT(entry_repr)},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

const PyType_Spec py_entry_spec = {
    .name = "deepspeed_autotp._core.Entry",
    .basicsize = sizeof(py_view),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
