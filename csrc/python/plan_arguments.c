/* SPDX-License-Identifier: Apache-2.0 */
/* plan_arguments.c -- what a Plan is made from. */
#include "python/plan_arguments.h"

#include <string.h>

/* The arguments of Plan; borrowed, NULL when not given. */
typedef struct {
    PyObject *model, *rules, *ranks, *grain, *strict, *defaults, *embedding_dim;
    PyObject *head_patterns, *replicated, *individual, *families, *heuristics;
    PyObject *large_layers, *large_names, *sequence_parallel, *vocab_parallel_lm_head;
    PyObject *all_tokens, *expert_partition, *must_shard;
} arguments;

static int
check_types(const py_state *state, const arguments *given)
{
    if (!PyObject_TypeCheck(given->model, state->types[PY_MODEL]))
        return py_wrong_type(given->model, "model", "a Model");
    if (!PyObject_TypeCheck(given->rules, state->types[PY_RULES]))
        return py_wrong_type(given->rules, "rules", "Rules");
    return 0;
}

static int
read_texts(PyObject *given, const char *what, py_texts *kept, const char *const **items,
           int *count)
{
    if (given == NULL)
        return 0;
    if (py_texts_read(kept, given, what) < 0)
        return -1;
    *items = kept->items;
    *count = kept->count;
    return 0;
}

/* True, False or None. */
static int
read_choice(PyObject *object, const char *what, int *out)
{
    *out = -1;
    if (object == NULL || object == Py_None)
        return 0;
    if (!PyBool_Check(object))
        return py_wrong_type(object, what, "True, False or None");
    *out = object == Py_True;
    return 0;
}

static int
read_partition(PyObject *object, tp_expert_partition *out)
{
    static const char *const names[] = {
        [TP_EXPERTS_IN_WIDTH] = "width",
        [TP_EXPERTS_WHOLE] = "experts",
        [TP_EXPERTS_AUTO] = "auto",
    };
    const char *name = names[TP_EXPERTS_IN_WIDTH];
    if (object != NULL && py_read_text(object, "expert_partition", &name) < 0)
        return -1;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strcmp(name, names[i]) == 0) {
            *out = (tp_expert_partition)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError,
                 "expert_partition: got '%s', expected 'width', 'experts' or 'auto'",
                 name);
    return -1;
}

static int
read_flags(const arguments *given, tp_plan_options *options)
{
    if (py_read_flag(given->strict, "strict", &options->strict) < 0 ||
        py_read_flag(given->defaults, "defaults", &options->defaults) < 0 ||
        py_read_flag(given->families, "families", &options->families) < 0 ||
        py_read_flag(given->heuristics, "heuristics", &options->heuristics) < 0 ||
        py_read_flag(given->large_layers, "large_layers", &options->large_layers) < 0 ||
        py_read_flag(given->sequence_parallel, "sequence_parallel",
                     &options->sequence) < 0 ||
        py_read_flag(given->must_shard, "must_shard", &options->must_shard) < 0)
        return -1;
    return read_choice(given->vocab_parallel_lm_head, "vocab_parallel_lm_head",
                       &options->vocab_parallel_lm_head);
}

/* A sequence of names or None; an empty one is not None. */
static int
read_large(const arguments *given, py_plan_arguments *out)
{
    static const char *const nothing[] = {""};
    tp_plan_options *options = &out->options;
    if (given->large_names == NULL || given->large_names == Py_None)
        return 0;
    if (read_texts(given->large_names, "large_names", &out->large,
                   &options->large_names, &options->large_name_count) < 0)
        return -1;
    if (options->large_name_count == 0)
        options->large_names = nothing;
    return 0;
}

static int
read_options(const arguments *given, py_plan_arguments *out)
{
    tp_plan_options *options = &out->options;
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
        py_read_int(given->embedding_dim, "embedding_dim", &options->embedding_dim) <
            0 ||
        read_flags(given, options) < 0 ||
        read_partition(given->expert_partition, &options->expert_partition) < 0 ||
        read_texts(given->replicated, "replicated", &out->replicated,
                   &options->replicated, &options->replicated_count) < 0 ||
        read_texts(given->individual, "individual", &out->individual,
                   &options->individual, &options->individual_count) < 0 ||
        read_texts(given->all_tokens, "all_tokens", &out->all_tokens,
                   &options->all_tokens, &options->all_tokens_count) < 0 ||
        read_large(given, out) < 0)
        return -1;
    return read_texts(given->head_patterns, "head_patterns", &out->heads,
                      &options->head_patterns, &options->head_pattern_count);
}

static int
parse(PyObject *args, PyObject *kwargs, arguments *given)
{
    static const char *const names[] = {"model",
                                        "rules",
                                        "ranks",
                                        "grain",
                                        "strict",
                                        "defaults",
                                        "embedding_dim",
                                        "head_patterns",
                                        "replicated",
                                        "individual",
                                        "families",
                                        "heuristics",
                                        "large_layers",
                                        "large_names",
                                        "sequence_parallel",
                                        "all_tokens",
                                        "vocab_parallel_lm_head",
                                        "expert_partition",
                                        "must_shard",
                                        NULL};
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "OO|$OOOOOOOOOOOOOOOOO:Plan", (char **)names, &given->model,
            &given->rules, &given->ranks, &given->grain, &given->strict,
            &given->defaults, &given->embedding_dim, &given->head_patterns,
            &given->replicated, &given->individual, &given->families,
            &given->heuristics, &given->large_layers, &given->large_names,
            &given->sequence_parallel, &given->all_tokens,
            &given->vocab_parallel_lm_head, &given->expert_partition,
            &given->must_shard))
        return -1;
    return py_check_required(given->ranks, "ranks");
}

int
py_plan_arguments_read(const py_state *state, PyObject *args, PyObject *kwargs,
                       py_plan_arguments *out)
{
    arguments given = {0};
    if (parse(args, kwargs, &given) < 0 || check_types(state, &given) < 0)
        return -1;
    out->model = given.model;
    out->rules = given.rules;
    return read_options(&given, out);
}

void
py_plan_arguments_clear(py_plan_arguments *given)
{
    py_texts_clear(&given->heads);
    py_texts_clear(&given->replicated);
    py_texts_clear(&given->individual);
    py_texts_clear(&given->all_tokens);
    py_texts_clear(&given->large);
}
