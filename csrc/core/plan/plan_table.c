/* SPDX-License-Identifier: Apache-2.0 */
/* plan_table.c -- a plan in as many rows as a person can read. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/map.h"
#include "base/text.h"
#include "model/names.h"
#include "plan/plan_build.h"

struct tp_plan_table {
    const tp_plan *plan; /* borrowed */
    const tp_model *model;
    tp_arena *arena; /* patterns and keys */
    tp_plan_row *rows;
    int count;
};

static const tp_parameter *
parameter_of(const tp_plan_table *table, int entry)
{
    const int parameter = tp_plan_entry(table->plan, entry)->parameter;
    return tp_model_parameter(table->model, parameter);
}

/* Everything that the entries of a row have in common. Equal layouts of a plan
 * are one layout, so its address stands for all local shapes. The pattern comes
 * first and ends at the line's end. */
static int
make_key(const tp_plan_table *table, int index, tp_text *key, tp_error *err)
{
    const tp_entry *entry = tp_plan_entry(table->plan, index);
    const tp_parameter *at = parameter_of(table, index);
    key->size = 0;
    tp_text_add(key, "%s", at->name);
    if (key->failed)
        return tp_fail_memory(err);
    tp_names_pattern(at->name, key->data);
    key->size = strlen(key->data);
    tp_text_add(key, "\n%d %d %d %d %p %" PRId64 " %" PRId64 " %s %s", (int)entry->kind,
                (int)entry->source, entry->dim, at->tied_to >= 0,
                (const void *)entry->layout, entry->outer, entry->inner, at->dtype,
                entry->rule);
    for (int i = 0; i < at->dims; i++)
        tp_text_add(key, " %" PRId64, at->shape[i]);
    return key->failed ? tp_fail_memory(err) : 0;
}

static int64_t
bytes_of(const tp_parameter *at, const int64_t *shape)
{
    int64_t bytes = at->tied_to >= 0 ? 0 : at->itemsize;
    for (int i = 0; i < at->dims; i++)
        bytes *= shape[i];
    return bytes;
}

static int
add_row(tp_plan_table *table, tp_map *map, const tp_text *key, int entry, tp_error *err)
{
    const size_t pattern = strcspn(key->data, "\n");
    const char *name = tp_arena_text(table->arena, key->data, pattern, err);
    const char *kept = tp_arena_text(table->arena, key->data, key->size, err);
    if (name == NULL || kept == NULL || tp_map_add(map, kept, table->count, err) < 0)
        return -1;
    table->rows[table->count++] = (tp_plan_row){name, entry, 0, 0};
    return 0;
}

static int
group_entries(tp_plan_table *table, tp_map *map, tp_text *key, tp_error *err)
{
    const int count = tp_plan_entry_count(table->plan);
    for (int i = 0; i < count; i++) {
        if (make_key(table, i, key, err) < 0)
            return -1;
        int row = tp_map_find(map, key->data, key->size);
        if (row < 0) {
            row = table->count;
            if (add_row(table, map, key, i, err) < 0)
                return -1;
        }
        const tp_parameter *at = parameter_of(table, i);
        table->rows[row].count++;
        table->rows[row].full_bytes += bytes_of(at, at->shape);
    }
    return 0;
}

int
tp_plan_table_new(const tp_plan *plan, tp_plan_table **out, tp_error *err)
{
    *out = NULL;
    tp_plan_table *table = calloc(1, sizeof(*table));
    if (table == NULL)
        return tp_fail_memory(err);
    table->plan = plan;
    table->model = plan->model;

    tp_text key = TP_NO_TEXT;
    tp_map *map = NULL;
    int result = -1;
    const size_t room = (size_t)tp_plan_entry_count(plan) + 1;
    table->rows = calloc(room, sizeof(*table->rows));
    if (table->rows == NULL) {
        tp_fail_memory(err);
        goto done;
    }
    if (tp_arena_new(&table->arena, err) < 0 || tp_map_new(64, &map, err) < 0 ||
        group_entries(table, map, &key, err) < 0)
        goto done;
    *out = table;
    table = NULL;
    result = 0;
done:
    tp_text_free(&key);
    tp_map_free(map);
    tp_plan_table_free(table);
    return result;
}

int
tp_plan_table_count(const tp_plan_table *table)
{
    return table->count;
}

const tp_plan_row *
tp_plan_table_row(const tp_plan_table *table, int index)
{
    return &table->rows[index];
}

int64_t
tp_plan_table_bytes(const tp_plan_table *table, int row, int rank)
{
    int64_t shape[TP_MAX_DIMS];
    const tp_plan_row *at = &table->rows[row];
    tp_plan_local_shape(table->plan, at->entry, rank, shape);
    return at->count * bytes_of(parameter_of(table, at->entry), shape);
}

void
tp_plan_table_free(tp_plan_table *table)
{
    if (table == NULL)
        return;
    free(table->rows);
    tp_arena_free(table->arena);
    free(table);
}
