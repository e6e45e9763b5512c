/* SPDX-License-Identifier: Apache-2.0 */
/* samples.c -- the parameters whose gradients are compared for all. */
#include "plan/samples.h"

#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "base/map.h"
#include "model/names.h"
#include "plan/plan_build.h"

/* A gradient of this many elements costs little. */
static const int64_t SMALL = 1 << 20;

/* Write the number of each entry's pattern to `pattern`. */
static int
number_patterns(const tp_plan *plan, tp_arena *arena, tp_map *map, int *pattern,
                tp_error *err)
{
    int known = 0;
    for (int i = 0; i < plan->entry_count; i++) {
        const char *name = tp_model_parameter(plan->model, i)->name;
        char *starred = tp_names_starred(arena, name, err);
        if (starred == NULL)
            return -1;
        pattern[i] = tp_map_add(map, starred, known, err);
        if (pattern[i] < 0)
            return -1;
        known += pattern[i] == known;
    }
    return 0;
}

/* Mark the first and the last entry of each pattern; `seen` has room for all. */
static void
mark_ends(const int *pattern, int count, bool *marked, bool *seen)
{
    for (int i = 0; i < count; i++) {
        marked[i] = !seen[pattern[i]];
        seen[pattern[i]] = true;
    }
    for (int i = count - 1; i >= 0; i--) {
        marked[i] |= seen[pattern[i]];
        seen[pattern[i]] = false;
    }
}

static void
mark_small_replicated(const tp_plan *plan, bool *marked)
{
    for (int i = 0; i < plan->entry_count; i++)
        marked[i] |= plan->entries[i].layout == NULL &&
                     tp_parameter_elements(tp_model_parameter(plan->model, i)) <= SMALL;
}

int
tp_plan_samples(const tp_plan *plan, int *out, int *count, tp_error *err)
{
    const size_t room = (size_t)plan->entry_count + 1;
    tp_arena *arena = NULL;
    tp_map *map = NULL;
    int *pattern = calloc(room, sizeof(*pattern));
    bool *flags = calloc(2 * room, sizeof(*flags));
    int result = -1;
    if (pattern == NULL || flags == NULL) {
        tp_fail_memory(err);
        goto done;
    }
    if (tp_arena_new(&arena, err) < 0 || tp_map_new(64, &map, err) < 0 ||
        number_patterns(plan, arena, map, pattern, err) < 0)
        goto done;
    mark_ends(pattern, plan->entry_count, flags, flags + room);
    mark_small_replicated(plan, flags);
    *count = 0;
    for (int i = 0; i < plan->entry_count; i++)
        if (flags[i])
            out[(*count)++] = i;
    result = 0;
done:
    free(pattern);
    free(flags);
    tp_map_free(map);
    tp_arena_free(arena);
    return result;
}
