/* SPDX-License-Identifier: Apache-2.0 */
/* names.h -- the parts of names, and names whose indices do not matter.
 *
 * "model.layers.0.mlp" and "model.layers.1.mlp" are both "model.layers.*.mlp". */
#ifndef TP_NAMES_H
#define TP_NAMES_H

#include "base/arena.h"
#include "model/model.h"

/* The part of a name behind its last dot. */
const char *tp_names_leaf(const char *name);

/* Whether the part that `name` begins with, up to a dot or the end, is all digits. */
bool tp_names_is_index(const char *name);

/* Write `name` with each part that is all digits as `*`. `out` has room for the
 * name's length and a NUL; the result is never longer than the name. */
void tp_names_pattern(const char *name, char *out);

/* The same in the arena, or NULL with `err` filled. */
char *tp_names_starred(tp_arena *arena, const char *name, tp_error *err);

/* Whether two names have the same pattern: they differ in indices only. */
bool tp_names_are_alike(const char *a, const char *b);

typedef struct {
    const char **names; /* in the arena, each once, in the model's order */
    int count;
} tp_names;

/* The starred names of all modules and parameters of `model`. */
int tp_names_of_model(tp_arena *arena, const tp_model *model, tp_names *out,
                      tp_error *err);

/* The last `parts` parts of each name, each once. Names that are shorter stay
 * as they are. */
int tp_names_tails(tp_arena *arena, const tp_names *names, int parts, tp_names *out,
                   tp_error *err);

#endif
