/* SPDX-License-Identifier: Apache-2.0 */
/* model.c -- a model as names, shapes and integers: adding and reading. */
#include "model/model.h"

#include <stdlib.h>
#include <string.h>

#include "model/model_data.h"

int
tp_model_new(tp_model **out, tp_error *err)
{
    *out = NULL;
    tp_model *model = calloc(1, sizeof(*model));
    if (model == NULL)
        return tp_fail_memory(err);
    if (tp_arena_new(&model->arena, err) < 0) {
        free(model);
        return -1;
    }
    *out = model;
    return 0;
}

void
tp_model_free(tp_model *model)
{
    if (model == NULL)
        return;
    tp_arena_free(model->arena);
    free(model->modules);
    free(model->parameters);
    tp_map_free(model->module_names);
    free(model->first_parameter);
    free(model->next_parameter);
    free(model);
}

/* A list that holds `count` and `*room` items, made large enough for one more. */
static int
grow(void **list, int count, int *room, size_t size, tp_error *err)
{
    if (count < *room)
        return 0;
    const int more = *room == 0 ? 64 : *room * 2;
    void *grown = realloc(*list, (size_t)more * size);
    if (grown == NULL)
        return tp_fail_memory(err);
    *list = grown;
    *room = more;
    return 0;
}

const char *
tp_model_copy_text(tp_model *model, const char *text, tp_error *err)
{
    if (text == NULL)
        text = "";
    return tp_arena_text(model->arena, text, strlen(text), err);
}

/* As tp_model_copy_text, unless the text is the one copied to `last` before. */
static const char *
share_text(tp_model *model, const char *text, const char **last, tp_error *err)
{
    if (text == NULL || *last == NULL || strcmp(text, *last) != 0)
        *last = tp_model_copy_text(model, text, err);
    return *last;
}

int
tp_model_copy_integers(tp_model *model, const tp_integer *from, int count,
                       const tp_integer **out, tp_error *err)
{
    *out = NULL;
    if (count <= 0)
        return 0;
    tp_integer *copy = tp_arena_take(model->arena, (size_t)count, sizeof(*copy), err);
    if (copy == NULL)
        return -1;
    for (int i = 0; i < count; i++) {
        copy[i].value = from[i].value;
        copy[i].key = tp_model_copy_text(model, from[i].key, err);
        if (copy[i].key == NULL)
            return -1;
    }
    *out = copy;
    return 0;
}

static int
check_open(const tp_model *model, tp_error *err)
{
    if (model->sealed)
        return tp_fail(err, TP_BUG, "the model is sealed: nothing can be added");
    return 0;
}

int
tp_model_add_module(tp_model *model, const tp_module *module, int *index, tp_error *err)
{
    if (check_open(model, err) < 0)
        return -1;
    void *list = model->modules;
    const int result = grow(&list, model->module_count, &model->module_room,
                            sizeof(*model->modules), err);
    model->modules = list;
    if (result < 0)
        return -1;

    tp_module copy = *module;
    copy.parent = -1;
    copy.name = tp_model_copy_text(model, module->name, err);
    copy.class_name = share_text(model, module->class_name, &model->last_class, err);
    if (copy.name == NULL || copy.class_name == NULL ||
        tp_model_copy_integers(model, module->integers, module->integer_count,
                               &copy.integers, err) < 0)
        return -1;
    *index = model->module_count++;
    model->modules[*index] = copy;
    return 0;
}

/* Sizes of 0 count as 1: also a product of some of the sizes fits. */
static int
check_shape(const tp_parameter *parameter, int64_t *bytes, tp_error *err)
{
    if (parameter->dims < 0 || parameter->dims > TP_MAX_DIMS)
        return tp_fail(err, TP_VALUE,
                       "parameter '%s' has %d dimensions, but at most %d are supported",
                       parameter->name, parameter->dims, TP_MAX_DIMS);
    int64_t own = parameter->itemsize;
    bool fits = true;
    for (int i = 0; i < parameter->dims; i++) {
        const int64_t size = parameter->shape[i];
        if (size < 0)
            return tp_fail(err, TP_VALUE, "parameter '%s': shape[%d] is %lld",
                           parameter->name, i, (long long)size);
        fits = fits && !__builtin_mul_overflow(own, size > 0 ? size : 1, &own);
    }
    if (!fits || own > TP_MOST_BYTES - *bytes)
        return tp_fail(err, TP_VALUE,
                       "parameter '%s': with it the model has more than 2^56 bytes",
                       parameter->name);
    *bytes += own;
    return 0;
}

/* A tie names an earlier parameter that is no tie itself and has its shape. */
static int
check_tie(const tp_model *model, const tp_parameter *parameter, tp_error *err)
{
    const int first = parameter->tied_to;
    if (first < 0)
        return 0;
    if (first >= model->parameter_count || model->parameters[first].tied_to >= 0)
        return tp_fail(err, TP_VALUE,
                       "parameter '%s' is tied to index %d, which is not the first "
                       "name of an earlier parameter",
                       parameter->name, first);
    const tp_parameter *other = &model->parameters[first];
    bool same = other->dims == parameter->dims;
    for (int i = 0; same && i < parameter->dims; i++)
        same = other->shape[i] == parameter->shape[i];
    if (!same)
        return tp_fail(err, TP_VALUE,
                       "parameter '%s' is tied to '%s', but their shapes differ",
                       parameter->name, other->name);
    return 0;
}

int
tp_model_add_parameter(tp_model *model, const tp_parameter *parameter, int *index,
                       tp_error *err)
{
    int64_t bytes = model->bytes;
    if (check_open(model, err) < 0 || check_shape(parameter, &bytes, err) < 0 ||
        check_tie(model, parameter, err) < 0)
        return -1;
    if (parameter->module < 0 || parameter->module >= model->module_count)
        return tp_fail(err, TP_VALUE,
                       "parameter '%s' is in module %d, but there are %d modules",
                       parameter->name, parameter->module, model->module_count);
    void *list = model->parameters;
    const int result = grow(&list, model->parameter_count, &model->parameter_room,
                            sizeof(*model->parameters), err);
    model->parameters = list;
    if (result < 0)
        return -1;

    tp_parameter copy = *parameter;
    copy.name = tp_model_copy_text(model, parameter->name, err);
    copy.leaf = share_text(model, parameter->leaf, &model->last_leaf, err);
    copy.dtype = share_text(model, parameter->dtype, &model->last_dtype, err);
    if (copy.name == NULL || copy.leaf == NULL || copy.dtype == NULL)
        return -1;
    *index = model->parameter_count++;
    model->parameters[*index] = copy;
    model->bytes = bytes;
    return 0;
}

bool
tp_module_is_layer(const tp_module *module)
{
    return module->kind == TP_MODULE_LINEAR || module->kind == TP_MODULE_CONV1D ||
           module->kind == TP_MODULE_EMBEDDING;
}

int
tp_model_module_count(const tp_model *model)
{
    return model->module_count;
}

int
tp_model_parameter_count(const tp_model *model)
{
    return model->parameter_count;
}

const tp_module *
tp_model_module(const tp_model *model, int index)
{
    return &model->modules[index];
}

const tp_parameter *
tp_model_parameter(const tp_model *model, int index)
{
    return &model->parameters[index];
}

const tp_model_facts *
tp_model_get_facts(const tp_model *model)
{
    return &model->facts;
}

int64_t
tp_parameter_elements(const tp_parameter *parameter)
{
    int64_t result = 1;
    for (int i = 0; i < parameter->dims; i++)
        result *= parameter->shape[i];
    return result;
}

int64_t
tp_model_elements(const tp_model *model)
{
    int64_t total = 0;
    for (int i = 0; i < tp_model_parameter_count(model); i++) {
        const tp_parameter *at = tp_model_parameter(model, i);
        if (at->tied_to < 0)
            total += tp_parameter_elements(at);
    }
    return total;
}

int
tp_model_find_module(const tp_model *model, const char *name, size_t size)
{
    return tp_map_find(model->module_names, name, size);
}

int
tp_model_find_parameter(const tp_model *model, int module, const char *leaf)
{
    for (int i = model->first_parameter[module]; i >= 0; i = model->next_parameter[i]) {
        if (strcmp(model->parameters[i].leaf, leaf) == 0)
            return i;
    }
    return -1;
}

int
tp_model_first_parameter(const tp_model *model, int module)
{
    return model->first_parameter[module];
}

int
tp_model_next_parameter(const tp_model *model, int parameter)
{
    return model->next_parameter[parameter];
}

bool
tp_model_is_inside(const tp_model *model, int module, int top)
{
    while (module >= 0 && module != top)
        module = tp_model_module(model, module)->parent;
    return module >= 0;
}

int64_t
tp_model_integer(const tp_integer *integers, int count, const char *const *keys)
{
    for (; *keys != NULL; keys++) {
        for (int i = 0; i < count; i++) {
            if (strcmp(integers[i].key, *keys) == 0)
                return integers[i].value;
        }
    }
    return -1;
}
