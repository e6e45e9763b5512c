/* SPDX-License-Identifier: Apache-2.0 */
/* adapters.c -- the names that PEFT gives to what it wraps. */
#include "model/adapters.h"

#include <string.h>

#include "model/names.h"

typedef struct {
    const char *part; /* of a name, between dots */
    tp_adapted adapted;
    bool named; /* the part behind it is the adapter's name */
} adapter_row;

/* From https://github.com/huggingface/peft/tree/main/src/peft/tuners/lora and
 * peft/utils/other.py. */
static const adapter_row rows[] = {
    {"base_layer", TP_ADAPTED_LAYER, false},
    {"original_module", TP_ADAPTED_LAYER, false},
    {"modules_to_save", TP_ADAPTED_LAYER, true},
    {"lora_A", TP_ADAPTED_DOWN, true},
    {"lora_B", TP_ADAPTED_UP, true},
};

static const char prefix[] = "base_model.model.";

static const adapter_row *
find_row(const char *part, size_t size)
{
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        if (strlen(rows[i].part) == size && memcmp(rows[i].part, part, size) == 0)
            return &rows[i];
    }
    return NULL;
}

tp_adapted
tp_adapters_name(const char *name, char *out, size_t size)
{
    tp_adapted found = TP_ADAPTED_NONE;
    size_t used = 0;
    bool skip = false; /* an adapter's name */

    out[0] = '\0';
    if (strlen(name) >= size)
        return TP_ADAPTED_NONE;
    if (strncmp(name, prefix, sizeof(prefix) - 1) == 0) {
        name += sizeof(prefix) - 1;
        found = TP_ADAPTED_ROOT;
    }
    while (*name != '\0') {
        const size_t part = strcspn(name, ".");
        const adapter_row *row = skip ? NULL : find_row(name, part);
        if (row != NULL) {
            found = row->adapted;
        } else if (!skip) {
            if (used > 0)
                out[used++] = '.';
            memcpy(out + used, name, part);
            used += part;
        }
        skip = row != NULL && row->named;
        name += part + (name[part] == '.');
    }
    out[used] = '\0';
    return found;
}

const char *
tp_adapters_plain(const char *name, char *out, tp_adapted *part)
{
    *part = tp_adapters_name(name, out, TP_LONGEST_NAME);
    return *part == TP_ADAPTED_NONE ? name : out;
}

int
tp_adapters_parent(const tp_model *model, int module)
{
    char own[TP_LONGEST_NAME], other[TP_LONGEST_NAME];
    tp_adapted part;
    int parent = tp_model_module(model, module)->parent;
    tp_adapters_plain(tp_model_module(model, module)->name, own, &part);
    while (part > TP_ADAPTED_ROOT && parent >= 0) {
        tp_adapted unused;
        const char *name = tp_model_module(model, parent)->name;
        if (strcmp(tp_adapters_plain(name, other, &unused), own) != 0)
            break;
        parent = tp_model_module(model, parent)->parent;
    }
    return parent;
}

bool
tp_adapters_is_copy(const char *name)
{
    char room[TP_LONGEST_NAME];
    return strstr(name, ".modules_to_save.") != NULL &&
           tp_adapters_name(name, room, sizeof(room)) == TP_ADAPTED_LAYER;
}

bool
tp_adapters_is_list(const char *name)
{
    const char *leaf = tp_names_leaf(name);
    const adapter_row *row = find_row(leaf, strlen(leaf));
    return row != NULL && row->named;
}

bool
tp_adapters_is_dropouts(const char *leaf)
{
    return strcmp(leaf, "lora_dropout") == 0;
}
