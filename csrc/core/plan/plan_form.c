/* SPDX-License-Identifier: Apache-2.0 */
/* plan_form.c -- whether two plans treat alike what is called alike. */
#include "plan/plan_form.h"

#include <string.h>

#include "base/map.h"
#include "model/names.h"
#include "plan/plan_build.h"

/* What a plan says, a line for each thing it says, each once. */
typedef struct {
    tp_arena *arena;
    tp_map *map; /* to indices of `lines` */
    const char **lines;
    int count;
    int room;
} form;

/* Add the line, which becomes empty. */
static int
add(form *into, tp_text *line, tp_error *err)
{
    char *text =
        line->failed ? NULL : tp_arena_text(into->arena, line->data, line->size, err);
    if (line->failed)
        tp_fail_memory(err);
    tp_text_free(line);
    if (text == NULL)
        return -1;
    const int index = tp_map_add(into->map, text, into->count, err);
    if (index < 0)
        return -1;
    if (index == into->count) {
        if (into->count == into->room) {
            const int room = 2 * into->room + 64;
            const char **lines =
                tp_arena_take(into->arena, (size_t)room, sizeof(*lines), err);
            if (lines == NULL)
                return -1;
            if (into->count > 0)
                memcpy(lines, into->lines, (size_t)into->count * sizeof(*lines));
            into->lines = lines;
            into->room = room;
        }
        into->lines[into->count++] = text;
    }
    return 0;
}

/* `name` without its indices. */
static int
begin(form *into, tp_text *line, const char *name, tp_error *err)
{
    char *pattern = tp_names_starred(into->arena, name, err);
    if (pattern == NULL)
        return -1;
    tp_text_add(line, "%s", pattern[0] == '\0' ? "the model" : pattern);
    return 0;
}

static void
describe_layout(tp_text *line, const tp_layout *layout)
{
    bool even = true;
    for (int rank = 0; rank < layout->ranks; rank++)
        even = even && layout->shards[rank].width == layout->shards[0].width;
    tp_text_add(line, ", %s shards", even ? "equal" : "unequal");
    for (int rank = 0; rank < layout->ranks; rank++) {
        const tp_shard *shard = &layout->shards[rank];
        tp_text_add(line, rank == 0 ? " of " : ", ");
        tp_text_add(line, "%d", shard->count);
        for (int i = 0; i < shard->count; i++)
            if (shard->runs[i].holders > 1)
                tp_text_add(line, " (run %d held by %d from %d)", i,
                            shard->runs[i].holders, shard->runs[i].owner);
    }
    tp_text_add(line, " runs");
}

static int
add_modules(form *into, const tp_plan *plan, tp_error *err)
{
    for (int i = 0; i < tp_model_module_count(plan->model); i++) {
        const tp_module *module = tp_model_module(plan->model, i);
        tp_text line = TP_NO_TEXT;
        if (begin(into, &line, module->name, err) < 0)
            return -1;
        tp_text_add(&line, ", a %s", module->class_name);
        if (add(into, &line, err) < 0)
            return -1;
    }
    return 0;
}

static int
add_entries(form *into, const tp_plan *plan, tp_error *err)
{
    for (int i = 0; i < plan->entry_count; i++) {
        const tp_entry *entry = &plan->entries[i];
        const tp_parameter *parameter = tp_model_parameter(plan->model, i);
        tp_text line = TP_NO_TEXT;
        if (begin(into, &line, parameter->name, err) < 0)
            return -1;
        tp_text_add(&line, ", %s%s with %d dimensions", tp_kind_name(entry->kind),
                    parameter->tied_to < 0 ? "" : ", tied,", parameter->dims);
        if (entry->layout != NULL) {
            tp_text_add(&line, ", sharded in %d", entry->dim);
            describe_layout(&line, entry->layout);
        }
        if (add(into, &line, err) < 0)
            return -1;
    }
    return 0;
}

static int
add_layers(form *into, const tp_plan *plan, tp_error *err)
{
    for (int i = 0; i < plan->layer_count; i++) {
        const tp_layer *layer = &plan->layers[i];
        tp_text line = TP_NO_TEXT;
        if (begin(into, &line, tp_model_module(plan->model, layer->module)->name, err) <
            0)
            return -1;
        tp_text_add(
            &line, ", a layer: %s%s%s%s%s, %d divided%s", tp_kind_name(layer->kind),
            layer->gather_output ? ", gathers its output" : "",
            layer->split_input ? ", splits its input" : "",
            layer->is_large ? ", large" : "",
            plan->logits_layer == i ? ", keeps its logits" : "", layer->divided_count,
            layer->sibling_count > 0 ? ", with siblings" : "");
        if (layer->heads != NULL)
            describe_layout(&line, layer->heads);
        if (add(into, &line, err) < 0)
            return -1;
    }
    return 0;
}

static int
add_rest(form *into, const tp_plan *plan, tp_error *err)
{
    for (int i = 0; i < plan->integer_count; i++) {
        const tp_local_integer *integer = &plan->integers[i];
        tp_text line = TP_NO_TEXT;
        if (begin(into, &line, tp_model_module(plan->model, integer->module)->name,
                  err) < 0)
            return -1;
        tp_text_add(&line, ", a local %s", integer->key);
        if (add(into, &line, err) < 0)
            return -1;
    }
    for (int i = 0; i < plan->stack_count; i++) {
        tp_text line = TP_NO_TEXT;
        if (begin(into, &line,
                  tp_model_module(plan->model, plan->stacks[i].owner)->name, err) < 0)
            return -1;
        tp_text_add(&line, ", sharded tokens");
        if (add(into, &line, err) < 0)
            return -1;
    }
    return 0;
}

static int
make(form *into, const tp_plan *plan, tp_error *err)
{
    if (tp_arena_new(&into->arena, err) < 0 || tp_map_new(256, &into->map, err) < 0 ||
        add_modules(into, plan, err) < 0 || add_entries(into, plan, err) < 0 ||
        add_layers(into, plan, err) < 0)
        return -1;
    return add_rest(into, plan, err);
}

static const char *
missing(const form *from, const form *in)
{
    for (int i = 0; i < in->count; i++)
        if (tp_map_find(from->map, in->lines[i], strlen(in->lines[i])) < 0)
            return in->lines[i];
    return NULL;
}

int
tp_plan_form_difference(const tp_plan *plan, const tp_plan *other, tp_text *why,
                        tp_error *err)
{
    form forms[2] = {{0}, {0}};
    int result = -1;
    if (make(&forms[0], plan, err) < 0 || make(&forms[1], other, err) < 0)
        goto done;
    const char *only = missing(&forms[1], &forms[0]);
    if (only == NULL)
        only = missing(&forms[0], &forms[1]);
    if (only != NULL)
        tp_text_add(why, "%s", only);
    result = why->failed ? tp_fail_memory(err) : 0;
done:
    for (int i = 0; i < 2; i++) {
        tp_map_free(forms[i].map);
        tp_arena_free(forms[i].arena);
    }
    return result;
}
