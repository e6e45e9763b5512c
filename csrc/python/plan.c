/* SPDX-License-Identifier: Apache-2.0 */
/* plan.c -- the type Plan: what happens to every parameter. */
#include "python/args.h"
#include "python/holder.h"
#include "python/row.h"

typedef struct {
    PyObject_HEAD PyObject *holder; /* strong */
    PyObject *entries;              /* strong: tuple; NULL until it is asked for */
} py_plan;

/* The arguments of Plan; borrowed, NULL when not given. */
typedef struct {
    PyObject *model, *rules, *ranks, *grain, *strict, *defaults, *embedding_dim;
    PyObject *head_patterns, *whole, *apart, *families, *guesses, *alone, *sequence;
} arguments;

static const tp_plan *
get(PyObject *self)
{
    return ((py_holder *)((py_plan *)self)->holder)->plan;
}

static int
check_types(const py_state *state, const arguments *given)
{
    if (!PyObject_TypeCheck(given->model, state->types[PY_MODEL]))
        return py_wrong_type(given->model, "model", "a Model");
    if (!PyObject_TypeCheck(given->rules, state->types[PY_RULES]))
        return py_wrong_type(given->rules, "rules", "Rules");
    return 0;
}

/* The texts that options borrow. */
typedef struct {
    py_texts heads, whole, apart;
} texts;

static int
read_options(const arguments *given, tp_plan_options *options, texts *kept)
{
    static const char *const default_heads[] = {"lm_head", "embed_out"};
    options->grain = 1;
    options->defaults = true;
    options->families = true;
    options->heuristics = true;
    options->large_layers = true;
    options->embedding_dim = 1;
    options->head_patterns = default_heads;
    options->head_pattern_count = 2;
    if (py_read_int(given->ranks, "ranks", &options->ranks) < 0 ||
        py_read_int64(given->grain, "grain", &options->grain) < 0 ||
        py_read_flag(given->strict, "strict", &options->strict) < 0 ||
        py_read_flag(given->defaults, "defaults", &options->defaults) < 0 ||
        py_read_flag(given->families, "families", &options->families) < 0 ||
        py_read_flag(given->guesses, "guesses", &options->heuristics) < 0 ||
        py_read_flag(given->sequence, "sequence", &options->sequence) < 0 ||
        py_read_flag(given->alone, "alone", &options->large_layers) < 0 ||
        py_read_int(given->embedding_dim, "embedding_dim", &options->embedding_dim) < 0)
        return -1;
    if (given->whole != NULL && py_texts_read(&kept->whole, given->whole, "whole") < 0)
        return -1;
    options->replicated = kept->whole.items;
    options->replicated_count = kept->whole.count;
    if (given->apart != NULL && py_texts_read(&kept->apart, given->apart, "apart") < 0)
        return -1;
    options->individual = kept->apart.items;
    options->individual_count = kept->apart.count;
    if (given->head_patterns == NULL)
        return 0;
    if (py_texts_read(&kept->heads, given->head_patterns, "head_patterns") < 0)
        return -1;
    options->head_patterns = kept->heads.items;
    options->head_pattern_count = kept->heads.count;
    return 0;
}

static PyObject *
plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {
        "model",    "rules",         "ranks",         "grain",    "strict",
        "defaults", "embedding_dim", "head_patterns", "whole",    "apart",
        "families", "guesses",       "alone",         "sequence", NULL};
    py_state *state = PyType_GetModuleState(type);
    arguments given = {0};
    tp_plan_options options = {0};
    texts kept = {PY_NO_TEXTS, PY_NO_TEXTS, PY_NO_TEXTS};
    PyObject *self = NULL;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "OO|$OOOOOOOOOOOO:Plan", (char **)names, &given.model,
            &given.rules, &given.ranks, &given.grain, &given.strict, &given.defaults,
            &given.embedding_dim, &given.head_patterns, &given.whole, &given.apart,
            &given.families, &given.guesses, &given.alone, &given.sequence) ||
        py_check_required(given.ranks, "ranks") < 0 || check_types(state, &given) < 0)
        return NULL;
    if (read_options(&given, &options, &kept) < 0)
        goto done;
    self = PyType_GenericAlloc(type, 0);
    if (self == NULL)
        goto done;
    ((py_plan *)self)->holder =
        py_holder_new(state, given.model, given.rules, &options);
    if (((py_plan *)self)->holder == NULL)
        Py_CLEAR(self);
done:
    py_texts_clear(&kept.heads);
    py_texts_clear(&kept.whole);
    py_texts_clear(&kept.apart);
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
plan_get_hash(PyObject *self, void *closure)
{
    (void)closure;
    static const char digits[] = "0123456789abcdef";
    const uint64_t hash = tp_plan_hash(get(self));
    char text[16];
    for (int i = 0; i < 16; i++)
        text[i] = digits[hash >> (60 - 4 * i) & 15];
    return PyUnicode_FromStringAndSize(text, 16);
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
plan_get_notes(PyObject *self, void *closure)
{
    (void)closure;
    const int count = tp_plan_message_count(get(self));
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i,
                     PyUnicode_FromString(tp_plan_message(get(self), i)->text));
    return tuple;
}

/* The names of modules. New, or NULL. */
static PyObject *
module_names(PyObject *self, const tp_modules *modules)
{
    const tp_model *model =
        py_model_get(((py_holder *)((py_plan *)self)->holder)->model);
    PyObject *tuple = PyTuple_New(modules->count);
    for (int i = 0; tuple != NULL && i < modules->count; i++)
        py_tuple_put(
            &tuple, i,
            PyUnicode_FromString(tp_model_module(model, modules->items[i])->name));
    return tuple;
}

static PyObject *
stack_tuple(PyObject *self, const tp_stack *stack)
{
    const tp_modules parts[] = {{&stack->owner, 1},
                                stack->stages,
                                stack->inlets,
                                stack->outlets,
                                stack->islands};
    PyObject *tuple = PyTuple_New(5);
    for (int i = 0; tuple != NULL && i < 5; i++)
        py_tuple_put(&tuple, i, module_names(self, &parts[i]));
    return tuple;
}

static PyObject *
plan_get_stacks(PyObject *self, void *closure)
{
    (void)closure;
    const int count = tp_plan_stack_count(get(self));
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i, stack_tuple(self, tp_plan_stack(get(self), i)));
    return tuple;
}

static PyObject *
plan_table(PyObject *self, PyObject *unused)
{
    (void)unused;
    return py_row_table(py_state_of(self), ((py_plan *)self)->holder);
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
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"ranks", plan_get_ranks, NULL, "Ranks the model is cut over.", NULL},
    {"hash", plan_get_hash, NULL,
     "16 hexadecimal digits, equal for equal plans of equal models.", NULL},
    {"entries", plan_get_entries, NULL, "One Entry per parameter, in order.", NULL},
    {"layers", plan_get_layers, NULL, "One Layer per module that changes.", NULL},
    {"integers", plan_get_integers, NULL, "The attributes that become local.", NULL},
    {"stacks", plan_get_stacks, NULL,
     "Where tokens are cut: names of owner, stages, inlets, outlets and islands.",
     NULL},
    {"notes", plan_get_notes, NULL, "What the user should know.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc,
     (void
          *)"Plan(model, rules, *, ranks, grain=1, strict=False, defaults=True, "
            "embedding_dim=1, head_patterns=('lm_head', 'embed_out'), whole=(), "
            "apart=(), families=True, guesses=True, alone=True, sequence=False)\n--\n\n"
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
