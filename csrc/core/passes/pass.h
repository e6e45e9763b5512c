/* SPDX-License-Identifier: Apache-2.0 */
/* pass.h -- one step of making a plan, and what it reads and writes.
 *
 * A table of passes is run in its order. Knows nothing of what a pass does. */
#ifndef TP_PASS_H
#define TP_PASS_H

#include "plan/plan_build.h"

/* The parts of a build and its plan that passes hand to each other. The model, the
 * rules and the options are there from the start, and no pass changes them. */
typedef enum {
    TP_PART_FIXED, /* ranks and names of tensors: no pass may write them */
    TP_PART_CHOICES,
    TP_PART_STARS,
    TP_PART_MATCHED,
    TP_PART_MODULE_RULES,
    TP_PART_ATTENTIONS,
    TP_PART_GEOMETRIES,
    TP_PART_PAIRED,
    TP_PART_STACKED,
    TP_PART_DECISIONS,
    TP_PART_LAYOUTS,
    TP_PART_EXPERTS,
    TP_PART_ENTRIES,
    TP_PART_LAYERS, /* but for their siblings and regions */
    TP_PART_SIBLINGS,
    TP_PART_STACKS,
    TP_PART_REGIONS, /* with what layers open and close */
    TP_PART_INTEGERS,
    TP_PART_LOGITS,
    TP_PART_HASH,
    TP_PART_MESSAGES,
    TP_PART_COUNT
} tp_build_part;

typedef struct {
    const char *name;
    int (*run)(tp_build *build, tp_error *err);
    unsigned reads;  /* bits of parts that earlier passes have to write */
    unsigned writes; /* bits of parts that it may change */
} tp_pass;

/* Run the passes in their order, up to the first that fails. With `check`, fails with
 * TP_BUG where a pass reads what no earlier one writes, or changes what it does not
 * declare. What it reads is taken at its word, and of layouts, which are made once,
 * only the number is compared. */
int tp_passes_run(tp_build *build, const tp_pass *passes, int count, bool check,
                  tp_error *err);

/* "choices" */
const char *tp_part_name(tp_build_part part);

/* A hash of each part as it is; `out` has room for TP_PART_COUNT values. */
void tp_parts_hash(const tp_build *build, uint64_t *out);

#endif
