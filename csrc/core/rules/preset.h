/* SPDX-License-Identifier: Apache-2.0 */
/* preset.h -- DeepSpeed's seven presets as one table. */
#ifndef TP_PRESET_H
#define TP_PRESET_H

#include "base/error.h"
#include "rules/spec.h"

typedef struct {
    const char *pattern; /* as Python's re.match reads it; one per row */
    tp_spec spec;
} tp_preset_row;

typedef struct {
    const char *name;
    const tp_preset_row *rows;
    int count;
} tp_preset;

/* Names in the order of the table; `count` of them. Static lifetime. */
const char *const *tp_preset_names(int *count);

/* Case does not count. Fails with TP_VALUE naming the nearest presets. */
int tp_preset_find(const char *name, const tp_preset **out, tp_error *err);

#endif
