/* SPDX-License-Identifier: Apache-2.0 */
/* model_data.h -- how a model is stored; for model*.c alone.
 *
 * Everybody else reads a model through model.h. */
#ifndef TP_MODEL_DATA_H
#define TP_MODEL_DATA_H

#include <stdbool.h>

#include "base/arena.h"
#include "base/map.h"
#include "model/model.h"

struct tp_model {
    tp_arena *arena; /* every string and every list of integers */
    tp_module *modules;
    int module_count;
    int module_room;
    tp_parameter *parameters;
    int parameter_count;
    int parameter_room;
    int64_t bytes; /* of all parameters; an empty one counts as if its sizes were 1 */
    /* Chains of the parameters of a module, made by tp_model_seal. */
    int *first_parameter;   /* one per module; -1 ends a chain */
    int *next_parameter;    /* one per parameter */
    tp_map *module_names;   /* to their indices, made by tp_model_seal */
    const char *last_class; /* shared by neighbours that have the same; or NULL */
    const char *last_leaf;
    const char *last_dtype;
    tp_model_facts facts;
    bool sealed;
};

/* Add a text or integers to the model's arena; an absent text becomes "".
 * NULL, or -1, with `err` filled when memory runs out. */
const char *tp_model_copy_text(tp_model *model, const char *text, tp_error *err);
int tp_model_copy_integers(tp_model *model, const tp_integer *from, int count,
                           const tp_integer **out, tp_error *err);

#endif
