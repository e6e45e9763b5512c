/* SPDX-License-Identifier: Apache-2.0 */
/* merge_recorded_args.h -- recorded arguments against the configuration.
 *
 * Compares what tp_model_init recorded with what the configuration and the
 * arguments of initialize say. All conflicts of a call come in one error, each
 * with both values and where each came from; what is missing is filled in. */
#ifndef TP_MERGE_RECORDED_ARGS_H
#define TP_MERGE_RECORDED_ARGS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "config/recorded_args.h"

/* What the caller found. Sizes are -1 where the configuration has none, group
 * identities 0, dtype spellings NULL. */
typedef struct {
    int64_t autotp_size;   /* tensor_parallel.autotp_size */
    int64_t tp_size;       /* tensor_parallel.tp.tp_size */
    int64_t tp_group;      /* identity of tensor_parallel.tp.tp_group */
    int64_t tp_group_size; /* its ranks; 0: unknown */
    const char *section;   /* "tp" or "tensor_parallel": the nested spelling used */
    const char *dtype;     /* tensor_parallel.dtype, as written */
    bool bf16;             /* bf16.enabled is true ("auto" is not) */
    bool fp16;
    bool has_mpu;  /* mpu was passed to initialize */
    bool has_mesh; /* mesh_param was passed, or a mesh is configured */
} tp_merge_facts;

/* What to write into the configuration: -1 or 0 where nothing is missing. */
typedef struct {
    int64_t autotp_size;
    int64_t tp_size;
    bool tp_group;    /* write the recorded group */
    bool make_groups; /* no group, mpu or mesh was given: create groups */
} tp_merge_fill;

/* `record` may be NULL: then only the configuration is checked against itself
 * (autotp_size against tp.tp_size and the group's size, bf16 against fp16, dtype
 * against both). */
int tp_merge(const tp_record *record, const tp_merge_facts *facts, tp_merge_fill *fill,
             tp_error *err);

/* "bfloat16", "float16" or NULL, from the two switches. bf16 wins, as in DeepSpeed. */
const char *tp_merge_precision(bool bf16, bool fp16);

#endif
