/* SPDX-License-Identifier: Apache-2.0 */
/* copies.c -- copies of modules that are trained in full, sharded as the originals. */
#include "passes/settle/copies.h"

#include <string.h>

#include "model/adapters.h"
#include "passes/choose/choose.h"

static const char list[] = ".modules_to_save.", original[] = ".original_module";

typedef struct {
    tp_build *build;
    tp_text room;
    const char *copy; /* the name of a module that is a copy, or is inside of one */
    size_t around;    /* length of the name of the module with the copy and original */
    size_t root;      /* length of the name of the copy that it is, or is inside of */
} search;

static void
look_at(search *with, const char *name)
{
    const char *adapter = strstr(name, list) + sizeof(list) - 1;
    with->copy = name;
    with->around = (size_t)(adapter - name) - (sizeof(list) - 1);
    with->root = (size_t)(adapter - name) + strcspn(adapter, ".");
}

/* The module that the copy is of, or -1. */
static int
find_original(search *with)
{
    with->room.size = 0;
    tp_text_add(&with->room, "%.*s%s%s", (int)with->around, with->copy, original,
                with->copy + with->root);
    if (with->room.failed)
        return -1;
    return tp_model_find_module(with->build->model, with->room.data, with->room.size);
}

/* What the copy has in the place of a module of the original; any other module is the
 * same for both. */
static int
find_own(search *with, int module)
{
    if (module < 0)
        return module;
    const char *name = tp_model_module(with->build->model, module)->name;
    const size_t tail = with->around + sizeof(original) - 1;
    if (strncmp(name, with->copy, with->around) != 0 ||
        strncmp(name + with->around, original, sizeof(original) - 1) != 0 ||
        (name[tail] != '\0' && name[tail] != '.'))
        return module;
    with->room.size = 0;
    tp_text_add(&with->room, "%.*s%s", (int)with->root, with->copy, name + tail);
    if (with->room.failed)
        return -1;
    return tp_model_find_module(with->build->model, with->room.data, with->room.size);
}

static bool
same_shape(const tp_model *model, int one, int other)
{
    const tp_parameter *a = tp_model_parameter(model, one);
    const tp_parameter *b = tp_model_parameter(model, other);
    bool same = a->dims == b->dims;
    for (int i = 0; same && i < a->dims; i++)
        same = a->shape[i] == b->shape[i];
    return same;
}

static int
follow_parameter(search *with, int own, int of, tp_error *err)
{
    tp_build *build = with->build;
    if (!same_shape(build->model, own, of))
        return tp_fail(err, TP_VALUE,
                       "'%s' is trained in full in the place of '%s', but their shapes "
                       "differ; resize the model before it gets an adapter",
                       tp_model_parameter(build->model, own)->name,
                       tp_model_parameter(build->model, of)->name);
    /* Of a replicated tensor, the first of its names says what happens to it. */
    const int from =
        build->decisions[of].layout == NULL ? tp_build_first(build, of) : of;
    build->choices[own] = build->choices[from];
    build->decisions[own] = build->decisions[from];
    build->decisions[own].attention = find_own(with, build->decisions[from].attention);
    return 0;
}

static int
follow(search *with, int copy, tp_error *err)
{
    tp_build *build = with->build;
    const tp_model *model = build->model;
    look_at(with, tp_model_module(model, copy)->name);
    const int of = find_original(with);
    if (of < 0)
        return 0;
    for (int i = tp_model_first_parameter(model, copy); i >= 0;
         i = tp_model_next_parameter(model, i)) {
        const int same =
            tp_model_find_parameter(model, of, tp_model_parameter(model, i)->leaf);
        if (same < 0 && tp_choose_weight_of(build, i) >= 0)
            return tp_fail(err, TP_VALUE,
                           "'%s' is trained in full in the place of '%s', which has no "
                           "bias; make the copy anew",
                           with->copy, tp_model_module(model, of)->name);
        if (same >= 0 && follow_parameter(with, i, same, err) < 0)
            return -1;
    }
    build->experts[copy] = build->experts[of];
    const int stacked = build->stacked[of];
    if (stacked < 0)
        return 0;
    const tp_parameter *at = tp_model_parameter(model, stacked);
    const int module = find_own(with, at->module);
    build->stacked[copy] =
        module < 0 ? -1 : tp_model_find_parameter(model, module, at->leaf);
    return 0;
}

static int
check_ties(const tp_build *build, int parameter, tp_error *err)
{
    const int first = tp_build_first(build, parameter);
    const tp_decision *own = &build->decisions[parameter];
    for (int i = first; i >= 0; i = build->next_name[i]) {
        const tp_decision *other = &build->decisions[i];
        if (other->dim == own->dim && other->layout == own->layout)
            continue;
        tp_fail(err, TP_VALUE,
                "it is one tensor with '%s', which is not sharded in the same way; "
                "let no adapter train a tied weight in full",
                tp_model_parameter(build->model, i)->name);
        return tp_build_refuse(build, parameter, &build->choices[parameter], err);
    }
    return 0;
}

int
tp_copies_settle(tp_build *build, tp_error *err)
{
    const tp_model *model = build->model;
    const int count = tp_model_module_count(model);
    search with = {.build = build, .room = TP_NO_TEXT};
    int result = 0;
    for (int i = 0; result == 0 && i < count; i++) {
        if (tp_adapters_is_copy(tp_model_module(model, i)->name))
            result = follow(&with, i, err);
    }
    if (result == 0 && with.room.failed)
        result = tp_fail_memory(err);
    for (int i = 0; result >= 0 && i < tp_model_parameter_count(model); i++) {
        const int module = tp_model_parameter(model, i)->module;
        if (tp_adapters_is_copy(tp_model_module(model, module)->name))
            result = check_ties(build, i, err);
    }
    tp_text_free(&with.room);
    return result < 0 ? -1 : 0;
}
