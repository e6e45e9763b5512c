/* SPDX-License-Identifier: Apache-2.0 */
/* plan.c -- the type Plan: what happens to every parameter. */
#include "python/module.h"

#include <stddef.h>

#include "core/plan/plan_form.h"
#include "core/plan/rank_share.h"
#include "core/plan/samples.h"
#include "python/args.h"
#include "python/holder.h"
#include "python/plan_arguments.h"
#include "python/rank_memory.h"
#include "python/table_row.h"

typedef struct {
    PyObject_HEAD PyObject *holder; /* strong */
    PyObject *entries;              /* strong: tuple; NULL until it is asked for */
} py_plan;

static const tp_plan *
get(PyObject *self)
{
    return ((py_holder *)((py_plan *)self)->holder)->plan;
}

static PyObject *
plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    py_state *state = PyType_GetModuleState(type);
    py_plan_arguments given = {0};
    PyObject *self = NULL;
    if (py_plan_arguments_read(state, args, kwargs, &given) < 0)
        goto done;
    self = PyType_GenericAlloc(type, 0);
    if (self == NULL)
        goto done;
    ((py_plan *)self)->holder =
        py_holder_new(state, given.model, given.rules, &given.options);
    if (((py_plan *)self)->holder == NULL)
        Py_CLEAR(self);
done:
    py_plan_arguments_clear(&given);
    return self;
}

static void
plan_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(((py_plan *)self)->entries);
    Py_XDECREF(((py_plan *)self)->holder);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *
plan_get_ranks(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLong(tp_plan_ranks(get(self)));
}

static PyObject *
hash_text(uint64_t hash)
{
    static const char digits[] = "0123456789abcdef";
    char text[16];
    for (int i = 0; i < 16; i++)
        text[i] = digits[hash >> (60 - 4 * i) & 15];
    return PyUnicode_FromStringAndSize(text, 16);
}

static PyObject *
plan_get_hash(PyObject *self, void *closure)
{
    (void)closure;
    return hash_text(tp_plan_hash(get(self)));
}

static PyObject *
plan_get_layout_hash(PyObject *self, void *closure)
{
    (void)closure;
    return hash_text(tp_plan_layout_hash(get(self)));
}

static PyObject *
plan_get_entries(PyObject *self, void *closure)
{
    (void)closure;
    py_plan *plan = (py_plan *)self;
    if (plan->entries == NULL)
        plan->entries = py_view_tuple(py_state_of(self), PY_ENTRY, plan->holder,
                                      tp_plan_entry_count(get(self)));
    return Py_XNewRef(plan->entries);
}

static PyObject *
plan_get_layers(PyObject *self, void *closure)
{
    (void)closure;
    return py_view_tuple(py_state_of(self), PY_LAYER, ((py_plan *)self)->holder,
                         tp_plan_layer_count(get(self)));
}

static PyObject *
plan_get_integers(PyObject *self, void *closure)
{
    (void)closure;
    return py_view_tuple(py_state_of(self), PY_INTEGER, ((py_plan *)self)->holder,
                         tp_plan_integer_count(get(self)));
}

static PyObject *
plan_get_skips_all(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(tp_plan_skips_all(get(self)));
}

static PyObject *
plan_get_messages(PyObject *self, void *closure)
{
    (void)closure;
    const int count = tp_plan_message_count(get(self));
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i,
                     PyUnicode_FromString(tp_plan_message(get(self), i)->text));
    return tuple;
}

static PyObject *
plan_get_stacks(PyObject *self, void *closure)
{
    (void)closure;
    return py_view_tuple(py_state_of(self), PY_STACK, ((py_plan *)self)->holder,
                         tp_plan_stack_count(get(self)));
}

/* `closure` is the offset of the list in a tp_regions. */
static PyObject *
plan_get_region_modules(PyObject *self, void *closure)
{
    const char *regions = (const char *)tp_plan_regions(get(self));
    const tp_modules *modules =
        (const tp_modules *)(regions + (size_t)(uintptr_t)closure);
    const py_holder *holder = (const py_holder *)((py_plan *)self)->holder;
    return py_module_names(py_model_get(holder->model), modules);
}

static PyObject *
plan_get_logits_layer(PyObject *self, void *closure)
{
    (void)closure;
    const int layer = tp_plan_logits_layer(get(self));
    if (layer < 0)
        return Py_NewRef(Py_None);
    return py_view_new(py_state_of(self), PY_LAYER, ((py_plan *)self)->holder, layer);
}

static PyObject *
plan_get_samples(PyObject *self, void *closure)
{
    (void)closure;
    tp_error err = TP_NO_ERROR;
    PyObject *tuple = NULL;
    int count = 0;
    int *found =
        PyMem_Calloc((size_t)tp_plan_entry_count(get(self)) + 1, sizeof(*found));
    if (found == NULL)
        return PyErr_NoMemory();
    if (tp_plan_samples(get(self), found, &count, &err) < 0) {
        py_raise(&err);
        goto done;
    }
    tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i, PyLong_FromLong(found[i]));
done:
    PyMem_Free(found);
    return tuple;
}

static PyObject *
plan_replicated_warning(PyObject *self, PyObject *unused)
{
    (void)unused;
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    PyObject *result = NULL;
    if (tp_plan_warn_replicated(get(self), &text, &err) < 0)
        py_raise(&err);
    else
        result = text.size == 0 ? Py_NewRef(Py_None) : PyUnicode_FromString(text.data);
    tp_text_free(&text);
    return result;
}

static PyObject *
plan_form_difference(PyObject *self, PyObject *other)
{
    tp_error err = TP_NO_ERROR;
    tp_text why = TP_NO_TEXT;
    PyObject *result = NULL;
    if (Py_TYPE(other) != Py_TYPE(self)) {
        py_wrong_type(other, "other", "a Plan");
        return NULL;
    }
    if (tp_plan_form_difference(get(self), get(other), &why, &err) < 0)
        py_raise(&err);
    else
        result = why.size == 0 ? Py_NewRef(Py_None) : PyUnicode_FromString(why.data);
    tp_text_free(&why);
    return result;
}

static PyObject *
plan_table(PyObject *self, PyObject *unused)
{
    (void)unused;
    return py_row_table(py_state_of(self), ((py_plan *)self)->holder);
}

static PyObject *
plan_rank_memory(PyObject *self, PyObject *args, PyObject *kwargs)
{
    return py_rank_memory(get(self), args, kwargs);
}

static PyObject *
plan_repr(PyObject *self)
{
    return PyUnicode_FromFormat("<Plan of %d parameters for %d ranks>",
                                tp_plan_entry_count(get(self)),
                                tp_plan_ranks(get(self)));
}

static PyMethodDef methods[] = {
    {"table", plan_table, METH_NOARGS,
     "table($self)\n--\n\n"
     "One row per group of parameters that differ in indices only."},
    {"replicated_warning", plan_replicated_warning, METH_NOARGS,
     "replicated_warning($self)\n--\n\n"
     "What to tell the user where a rank holds nearly everything, or None."},
    {"form_difference", plan_form_difference, METH_O,
     "form_difference($self, other, /)\n--\n\n"
     "What only one of the plans says of what is called alike, whatever its size, or "
     "None."},
    {"rank_memory", PY_KEYWORDS(plan_rank_memory), METH_VARARGS | METH_KEYWORDS,
     py_rank_memory_doc},
    {NULL, NULL, 0, NULL},
};

#define OFFSET(list) ((void *)(uintptr_t)offsetof(tp_regions, list))

static PyGetSetDef getters[] = {
    {"ranks", plan_get_ranks, NULL, "Ranks the model is sharded over.", NULL},
    {"hash", plan_get_hash, NULL,
     "16 hexadecimal digits, equal for equal plans of equal models.", NULL},
    {"entries", plan_get_entries, NULL, "One Entry per parameter, in order.", NULL},
    {"layers", plan_get_layers, NULL, "One Layer per module that changes.", NULL},
    {"integers", plan_get_integers, NULL, "The attributes that become local.", NULL},
    {"stacks", plan_get_stacks, NULL,
     "One Stack per list of layers between which the "
     "tokens are sharded.",
     NULL},
    {"region_blocks", plan_get_region_modules, NULL,
     "Names of the modules in whose forward layers open and close a sharded region.",
     OFFSET(blocks)},
    {"replicated_dropouts", plan_get_region_modules, NULL,
     "Names of dropouts within a sharded region, of what all ranks have.",
     OFFSET(replicated_dropouts)},
    {"sharded_dropouts", plan_get_region_modules, NULL,
     "Names of dropouts outside of one, of a rank's own features.",
     OFFSET(sharded_dropouts)},
    {"logits_layer", plan_get_logits_layer, NULL,
     "The Layer that keeps its shard of the logits where labels are given, or None.",
     NULL},
    {"samples", plan_get_samples, NULL,
     "Indices of the first and last entry of each pattern of names.", NULL},
    {"layout_hash", plan_get_layout_hash, NULL,
     "As hash, of names, shapes and runs alone.", NULL},
    {"skips_all", plan_get_skips_all, NULL,
     "Whether rules skip parameters and nothing else is asked for.", NULL},
    {"messages", plan_get_messages, NULL, "What the user should know.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc,
     (void *)"Plan(model, rules, *, ranks, grain=1, strict=False, defaults=True, "
             "embedding_dim=1, head_patterns=('lm_head', 'embed_out'), replicated=(), "
             "individual=(), families=True, heuristics=True, large_layers=True, "
             "large_names=None, sequence_parallel=False, all_tokens=(), "
             "vocab_parallel_lm_head=None, expert_partition='width', "
             "must_shard=False)\n--\n\n"
             "What happens to every parameter; decided here, never changed.\n\n"
             "ValueError, naming parameter, rule and sizes, for what cannot be right."},
    {Py_tp_new, PY_SLOT(plan_new)},
    {Py_tp_dealloc, PY_SLOT(plan_dealloc)},
    {Py_tp_repr, PY_SLOT(plan_repr)},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

const PyType_Spec py_plan_spec = {
    .name = "deepspeed_autotp._core.Plan",
    .basicsize = sizeof(py_plan),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
