/* SPDX-License-Identifier: Apache-2.0 */
/* model_seal.c -- what is found out once a model is complete: the parent of
 * every module and the parameters of each. */
#include <stdlib.h>
#include <string.h>

#include "base/map.h"
#include "model/model_data.h"

/* The nearest ancestor that was added. The model itself is everybody's. */
static int
find_parent(const tp_map *map, const char *name)
{
    size_t size = strlen(name);
    if (size == 0)
        return -1;
    while (size > 0) {
        while (size > 0 && name[size - 1] != '.')
            size--;
        if (size > 0)
            size--; /* the dot */
        const int found = tp_map_find(map, name, size);
        if (found >= 0)
            return found;
    }
    return -1;
}

static int
add_name(tp_map *map, const char *name, int index, const char *what, tp_error *err)
{
    const int held = tp_map_add(map, name, index, err);
    if (held >= 0 && held != index)
        return tp_fail(err, TP_VALUE, "two %s are called '%s'", what, name);
    return held < 0 ? -1 : 0;
}

static int
link_modules(tp_model *model, tp_error *err)
{
    tp_map_free(model->module_names); /* of an attempt that failed */
    model->module_names = NULL;
    int result = tp_map_new((size_t)model->module_count, &model->module_names, err);
    for (int i = 0; result == 0 && i < model->module_count; i++) {
        const char *name = model->modules[i].name;
        model->modules[i].parent = find_parent(model->module_names, name);
        result = add_name(model->module_names, name, i, "modules", err);
    }
    return result;
}

static int
check_names(const tp_model *model, tp_error *err)
{
    tp_map *map = NULL;
    int result = tp_map_new((size_t)model->parameter_count, &map, err);
    for (int i = 0; result == 0 && i < model->parameter_count; i++)
        result = add_name(map, model->parameters[i].name, i, "parameters", err);
    tp_map_free(map);
    return result;
}

static int
link_parameters(tp_model *model, tp_error *err)
{
    free(model->first_parameter); /* of an attempt that failed */
    free(model->next_parameter);
    model->first_parameter = calloc((size_t)model->module_count + 1, sizeof(int));
    model->next_parameter = calloc((size_t)model->parameter_count + 1, sizeof(int));
    if (model->first_parameter == NULL || model->next_parameter == NULL)
        return tp_fail_memory(err);
    for (int i = 0; i < model->module_count; i++)
        model->first_parameter[i] = -1;
    for (int i = model->parameter_count - 1; i >= 0; i--) {
        const int module = model->parameters[i].module;
        model->next_parameter[i] = model->first_parameter[module];
        model->first_parameter[module] = i;
    }
    return 0;
}

int
tp_model_seal(tp_model *model, const tp_model_facts *facts, tp_error *err)
{
    if (model->sealed)
        return tp_fail(err, TP_BUG, "the model is sealed already");
    if (facts->input_embedding >= model->module_count ||
        facts->output_head >= model->module_count)
        return tp_fail(err, TP_VALUE,
                       "input_embedding %d and output_head %d are to be modules, but "
                       "there are %d",
                       facts->input_embedding, facts->output_head, model->module_count);
    tp_model_facts *copy = &model->facts;
    *copy = *facts;
    copy->prefix = tp_model_copy_text(model, facts->prefix, err);
    if (facts->model_type != NULL)
        copy->model_type = tp_model_copy_text(model, facts->model_type, err);
    if (copy->prefix == NULL || (facts->model_type != NULL && copy->model_type == NULL))
        return -1;
    if (tp_model_copy_integers(model, facts->integers, facts->integer_count,
                               &copy->integers, err) < 0 ||
        link_modules(model, err) < 0 || check_names(model, err) < 0 ||
        link_parameters(model, err) < 0)
        return -1;
    model->sealed = true;
    return 0;
}
