/* SPDX-License-Identifier: Apache-2.0 */
/* plan_fixture.h -- a model, rules and options for the tests of a plan.
 *
 * A test adds modules and rules by name, makes the plan, and looks entries up
 * by name. */
#ifndef TP_PLAN_FIXTURE_H
#define TP_PLAN_FIXTURE_H

#include <stdarg.h>
#include <stdlib.h>

#include "check.h"
#include "passes/passes.h"

typedef struct {
    tp_model *model;
    tp_rules *rules;
    tp_plan *plan;
    tp_plan_options options;
    tp_model_facts facts;
    tp_integer integers[8]; /* of the configuration */
    const char *dtype;      /* of the parameters that are added */
    int itemsize;
    tp_error err;
} fixture;

static const char *const fixture_heads[] = {"lm_head", "embed_out"};

static inline fixture
fixture_new(int ranks)
{
    fixture f = {.facts = {.prefix = "model", .input_embedding = -1, .output_head = -1},
                 .options = {.ranks = ranks,
                             .grain = 1,
                             .defaults = true,
                             .embedding_dim = 1,
                             .head_patterns = fixture_heads,
                             .head_pattern_count = 2},
                 .dtype = "float32",
                 .itemsize = 4,
                 .err = TP_NO_ERROR};
    CHECK_OK(tp_model_new(&f.model, &f.err), &f.err);
    CHECK_OK(tp_rules_new(&f.rules, &f.err), &f.err);
    return f;
}

static inline void
fixture_free(fixture *f)
{
    tp_plan_free(f->plan);
    tp_model_free(f->model);
    tp_rules_free(f->rules);
    tp_error_clear(&f->err);
}

/* A fact of the configuration. */
static inline void
add_fact(fixture *f, const char *key, int64_t value)
{
    f->integers[f->facts.integer_count++] = (tp_integer){key, value};
}

/* A module with `count` integers, given as key, int, key, int, ... */
static inline int
add_module(fixture *f, const char *name, tp_module_kind kind, int count, ...)
{
    tp_integer integers[8];
    va_list arguments;
    va_start(arguments, count);
    for (int i = 0; i < count; i++) {
        integers[i].key = va_arg(arguments, const char *);
        integers[i].value = va_arg(arguments, int);
    }
    va_end(arguments);
    const tp_module module = {.name = name,
                              .class_name = "Any",
                              .kind = kind,
                              .integers = integers,
                              .integer_count = count};
    int index = -1;
    CHECK_OK(tp_model_add_module(f->model, &module, &index, &f->err), &f->err);
    return index;
}

/* A module of a class. Returns its index. */
static inline int
add_class(fixture *f, const char *name, const char *class_name)
{
    const tp_module module = {
        .name = name, .class_name = class_name, .kind = TP_MODULE_OTHER};
    int index = -1;
    CHECK_OK(tp_model_add_module(f->model, &module, &index, &f->err), &f->err);
    return index;
}

/* The parameter `module.leaf`, of `dims` sizes in `shape`. Returns its index. */
static inline int
add_shaped(fixture *f, int module, const char *leaf, int dims, const int64_t *shape,
           int tied_to)
{
    char name[256];
    snprintf(name, sizeof(name), "%s.%s", tp_model_module(f->model, module)->name,
             leaf);
    tp_parameter parameter = {.name = name,
                              .leaf = leaf,
                              .module = module,
                              .dims = dims,
                              .dtype = f->dtype,
                              .itemsize = f->itemsize,
                              .tied_to = tied_to};
    for (int i = 0; i < dims; i++)
        parameter.shape[i] = shape[i];
    int index = -1;
    CHECK_OK(tp_model_add_parameter(f->model, &parameter, &index, &f->err), &f->err);
    return index;
}

/* A module with a weight of rows x columns. Returns the weight's index. */
static inline int
add_matrix(fixture *f, const char *name, tp_module_kind kind, int rows, int columns)
{
    const int module = add_module(f, name, kind, 0);
    return add_shaped(f, module, "weight", 2, (int64_t[]){rows, columns}, -1);
}

static inline int
add_linear(fixture *f, const char *name, int out, int in)
{
    return add_matrix(f, name, TP_MODULE_LINEAR, out, in);
}

/* A 1-D parameter beside the weight with index `weight`. */
static inline int
add_vector(fixture *f, int weight, const char *leaf, int size)
{
    const int module = tp_model_parameter(f->model, weight)->module;
    return add_shaped(f, module, leaf, 1, (int64_t[]){size}, -1);
}

static inline char *
fixture_copy(const char *text)
{
    char *copy = malloc(strlen(text) + 1);
    strcpy(copy, text);
    return copy;
}

static inline void
add_spec(fixture *f, const char *label, const char *pattern, tp_spec spec)
{
    tp_rule rule = {.source = TP_FROM_CONFIG, .spec = spec, .pattern_count = 1};
    rule.label = fixture_copy(label);
    rule.patterns = calloc(1, sizeof(*rule.patterns));
    CHECK_OK(tp_spec_check(&spec, label, &f->err), &f->err);
    CHECK_OK(tp_regex_new(pattern, NULL, &rule.patterns[0], &f->err), &f->err);
    const int added = tp_rules_add(f->rules, &rule, &f->err); /* takes the rule */
    CHECK_OK(added, &f->err);
}

static inline void
add_rule(fixture *f, const char *label, const char *pattern, tp_partition partition)
{
    add_spec(f, label, pattern, (tp_spec){.partition = partition, .dim = -1});
}

static inline void
add_style(fixture *f, const char *pattern, const char *style)
{
    CHECK_OK(tp_rules_add_style(f->rules, pattern, style, false, &f->err), &f->err);
}

/* The projections of an attention module, as plans of transformers shard them. */
static inline void
add_attention_styles(fixture *f, const char *attention)
{
    static const char *const columns[] = {"q_proj", "k_proj", "v_proj"};
    char name[128];
    for (int i = 0; i < 3; i++) {
        snprintf(name, sizeof(name), "%s.%s", attention, columns[i]);
        add_style(f, name, "colwise");
    }
    snprintf(name, sizeof(name), "%s.o_proj", attention);
    add_style(f, name, "rowwise");
}

static inline void
add_preset(fixture *f, const char *name)
{
    CHECK_OK(tp_rules_add_preset(f->rules, name, &f->err), &f->err);
}

/* Seal the model and make the plan. */
static inline int
try_plan(fixture *f)
{
    f->facts.integers = f->integers;
    if (FAILING_EACH(tp_model_seal(f->model, &f->facts, &f->err), &f->err) < 0)
        return -1;
    return FAILING_EACH(tp_plan_new(f->model, f->rules, &f->options, &f->plan, &f->err),
                        &f->err);
}

/* The same with memory at all times, where each allocation failing in its turn says no
 * more than with a model like this one. */
static inline int
try_plan_once(fixture *f)
{
    f->facts.integers = f->integers;
    if (tp_model_seal(f->model, &f->facts, &f->err) < 0)
        return -1;
    return tp_plan_new(f->model, f->rules, &f->options, &f->plan, &f->err);
}

static inline bool
make_plan(fixture *f)
{
    const int result = try_plan(f);
    return CHECK_OK(result, &f->err);
}

/* The plan is refused with `part` in the message; ends the fixture. */
#define CHECK_REFUSED(f, part)                             \
    do {                                                   \
        const int refused = try_plan(f);                   \
        CHECK_FAILS(refused, TP_VALUE, &(f)->err, (part)); \
        CHECK((f)->plan == NULL);                          \
        fixture_free(f);                                   \
    } while (0)

/* Fails the test and gives the first entry where the name is not known. */
static inline const tp_entry *
entry_of(const fixture *f, const char *name)
{
    for (int i = 0; i < tp_plan_entry_count(f->plan); i++) {
        if (strcmp(tp_model_parameter(f->model, i)->name, name) == 0)
            return tp_plan_entry(f->plan, i);
    }
    CHECK_TEXT_EQ("no such parameter", name);
    return tp_plan_entry(f->plan, 0);
}

static inline const tp_layer *
layer_of(const fixture *f, const char *name)
{
    for (int i = 0; i < tp_plan_layer_count(f->plan); i++) {
        const tp_layer *layer = tp_plan_layer(f->plan, i);
        if (strcmp(tp_model_module(f->model, layer->module)->name, name) == 0)
            return layer;
    }
    return NULL;
}

/* "0+4 12+4": the runs of one rank. Holds until the next call. */
static inline const char *
runs_of(const fixture *f, const char *name, int rank)
{
    static char text[512];
    const tp_entry *entry = entry_of(f, name);
    size_t used = 0;
    text[0] = '\0';
    for (int i = 0; entry->layout != NULL && i < entry->layout->shards[rank].count;
         i++) {
        const tp_run *run = &entry->layout->shards[rank].runs[i];
        used += (size_t)snprintf(text + used, sizeof(text) - used, "%s%lld+%lld",
                                 i > 0 ? " " : "", (long long)run->start,
                                 (long long)run->length);
    }
    return text;
}

/* "column [4, 16]": kind and local shape on one rank. Holds until the next call. */
static inline const char *
local_of(const fixture *f, const char *name, int rank)
{
    static char text[256];
    const tp_entry *entry = entry_of(f, name);
    int64_t shape[TP_MAX_DIMS];
    tp_plan_local_shape(f->plan, entry->parameter, rank, shape);
    size_t used =
        (size_t)snprintf(text, sizeof(text), "%s [", tp_kind_name(entry->kind));
    const int dims = tp_model_parameter(f->model, entry->parameter)->dims;
    for (int i = 0; i < dims; i++)
        used += (size_t)snprintf(text + used, sizeof(text) - used, "%s%lld",
                                 i > 0 ? ", " : "", (long long)shape[i]);
    snprintf(text + used, sizeof(text) - used, "]");
    return text;
}

/* The local values of one integer, or NULL where it stays. */
static inline const int64_t *
integer_of(const fixture *f, const char *module, const char *key)
{
    for (int i = 0; i < tp_plan_integer_count(f->plan); i++) {
        const tp_local_integer *integer = tp_plan_integer(f->plan, i);
        const char *name = tp_model_module(f->model, integer->module)->name;
        if (strcmp(name, module) == 0 && strcmp(integer->key, key) == 0)
            return integer->values;
    }
    return NULL;
}

/* Names for the function below. */
#define NAMES(...) ((const char *const[]){__VA_ARGS__, NULL})

/* Whether these are exactly the modules, NULL at the end. */
static inline void
check_modules(const fixture *f, const tp_modules *modules, const char *const *names)
{
    int count = 0;
    while (names[count] != NULL)
        count++;
    CHECK_INT_EQ(modules->count, count);
    for (int i = 0; i < count && i < modules->count; i++)
        CHECK_TEXT_EQ(tp_model_module(f->model, modules->items[i])->name, names[i]);
}

#endif
