/* SPDX-License-Identifier: Apache-2.0 */
/* names.c -- the parts of names, and names whose indices do not matter. */
#include "model/names.h"

#include <stdlib.h>
#include <string.h>

#include "base/map.h"
#include "base/text.h"

const char *
tp_names_leaf(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot == NULL ? name : dot + 1;
}

bool
tp_names_is_index(const char *name)
{
    const size_t digits = strspn(name, "0123456789");
    return digits > 0 && (name[digits] == '.' || name[digits] == '\0');
}

void
tp_names_pattern(const char *name, char *out)
{
    while (*name != '\0') {
        const size_t size = strcspn(name, ".");
        if (tp_names_is_index(name)) {
            *out++ = '*';
        } else {
            memcpy(out, name, size);
            out += size;
        }
        name += size;
        if (*name == '.')
            *out++ = *name++;
    }
    *out = '\0';
}

char *
tp_names_starred(tp_arena *arena, const char *name, tp_error *err)
{
    char *starred = tp_arena_text(arena, name, strlen(name), err);
    if (starred != NULL)
        tp_names_pattern(name, starred);
    return starred;
}

bool
tp_names_are_alike(const char *a, const char *b)
{
    for (;;) {
        const size_t of_a = strcspn(a, "."), of_b = strcspn(b, ".");
        const bool indices = tp_names_is_index(a) && tp_names_is_index(b);
        if (a[of_a] != b[of_b] ||
            (!indices && (of_a != of_b || memcmp(a, b, of_a) != 0)))
            return false;
        if (a[of_a] == '\0')
            return true;
        a += of_a + 1;
        b += of_b + 1;
    }
}

/* Append `name` unless it is there. `name` outlives the list. */
static int
add_once(tp_map *map, const char *name, tp_names *list, tp_error *err)
{
    if (name[0] == '\0')
        return 0;
    const int held = tp_map_add(map, name, list->count, err);
    if (held == list->count)
        list->names[list->count++] = name;
    return held < 0 ? -1 : 0;
}

static int
new_list(tp_arena *arena, int room, tp_names *out, tp_error *err)
{
    out->count = 0;
    out->names = tp_arena_take(arena, (size_t)room + 1, sizeof(*out->names), err);
    return out->names == NULL ? -1 : 0;
}

/* Star `name` into `room`; copy it to the arena only when it is new. */
static int
add_starred(tp_arena *arena, tp_map *map, const char *name, tp_text *room,
            tp_names *list, tp_error *err)
{
    room->size = 0;
    tp_text_add(room, "%s", name);
    if (room->failed)
        return tp_fail_memory(err);
    tp_names_pattern(name, room->data);
    const size_t size = strlen(room->data);
    if (tp_map_find(map, room->data, size) >= 0)
        return 0;
    const char *copy = tp_arena_text(arena, room->data, size, err);
    return copy == NULL ? -1 : add_once(map, copy, list, err);
}

int
tp_names_of_model(tp_arena *arena, const tp_model *model, tp_names *out, tp_error *err)
{
    const int modules = tp_model_module_count(model);
    const int parameters = tp_model_parameter_count(model);
    tp_text room = TP_NO_TEXT;
    tp_map *map = NULL;
    int result = new_list(arena, modules + parameters, out, err);
    if (result == 0)
        result = tp_map_new(64, &map, err);
    for (int i = 0; result == 0 && i < modules; i++)
        result =
            add_starred(arena, map, tp_model_module(model, i)->name, &room, out, err);
    for (int i = 0; result == 0 && i < parameters; i++)
        result = add_starred(arena, map, tp_model_parameter(model, i)->name, &room, out,
                             err);
    tp_map_free(map);
    tp_text_free(&room);
    return result;
}

static const char *
tail(const char *name, int parts)
{
    const char *from = name + strlen(name);
    while (from > name && parts > 0) {
        from--;
        if (*from == '.')
            parts--;
    }
    return *from == '.' && parts == 0 ? from + 1 : from;
}

int
tp_names_tails(tp_arena *arena, const tp_names *names, int parts, tp_names *out,
               tp_error *err)
{
    tp_map *map = NULL;
    int result = new_list(arena, names->count, out, err);
    if (result == 0)
        result = tp_map_new((size_t)names->count, &map, err);
    for (int i = 0; result == 0 && i < names->count; i++)
        result = add_once(map, tail(names->names[i], parts), out, err);
    tp_map_free(map);
    return result;
}
