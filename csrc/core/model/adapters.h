/* SPDX-License-Identifier: Apache-2.0 */
/* adapters.h -- the names that PEFT gives to what it wraps.
 *
 * The layer "q_proj" becomes "base_model.model.q_proj.base_layer", and beside it are
 * "q_proj.lora_A.default" and "q_proj.lora_B.default". A layer that is trained in
 * full is there twice: as "original_module" and as "modules_to_save.default". */
#ifndef TP_ADAPTERS_H
#define TP_ADAPTERS_H

#include <stdbool.h>
#include <stddef.h>

#include "model/model.h"

enum { TP_LONGEST_NAME = 512 }; /* of those that are looked at for adapters */

typedef enum {
    TP_ADAPTED_NONE,  /* the name is the model's own */
    TP_ADAPTED_ROOT,  /* the same, within a model with adapters */
    TP_ADAPTED_LAYER, /* the layer itself, or a copy of it */
    TP_ADAPTED_DOWN,  /* lora_A: from the layer's input to few features */
    TP_ADAPTED_UP     /* lora_B: from these to the layer's output */
} tp_adapted;

/* Write the name that a plan of the model itself has for `name` to `out`, with room for
 * `size` bytes, and say what part of the adapted layer it is. A name that is too long
 * is left alone. */
tp_adapted tp_adapters_name(const char *name, char *out, size_t size);

/* As tp_adapters_name: the name that a plan has for `name`, which is `name` itself
 * where no adapter has to do with it; `out` has room for TP_LONGEST_NAME bytes. */
const char *tp_adapters_plain(const char *name, char *out, tp_adapted *part);

/* The module that a layer is in, or one that adapters have for it: not what they put
 * around it. -1: none. */
int tp_adapters_parent(const tp_model *model, int module);

/* Whether a module of that name is a copy that is trained in full, or inside of one. */
bool tp_adapters_is_copy(const char *name);

/* Whether a module of that name holds, by their names, what adapters have for a layer.
 */
bool tp_adapters_is_list(const char *name);

/* Whether a module of that leaf name holds the dropouts that adapters have for the
 * input of a layer. */
bool tp_adapters_is_dropouts(const char *leaf);

#endif
