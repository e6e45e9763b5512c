/* SPDX-License-Identifier: Apache-2.0 */
/* recorded_args.h -- the arguments that tp_model_init recorded.
 *
 * A record lives as long as its model; the caller removes it by its key when
 * the model dies. The list belongs to its holder: there is no global. */
#ifndef TP_RECORDED_ARGS_H
#define TP_RECORDED_ARGS_H

#include <stdint.h>

#include "base/error.h"

typedef struct {
    int64_t tp_size;
    const char *dtype;  /* canonical name, static lifetime */
    int64_t group;      /* identity of the process group; 0: none */
    int64_t group_size; /* ranks of the group; 0: unknown; -1: this is none of them */
} tp_record;

typedef struct tp_records tp_records;

int tp_records_new(tp_records **out, tp_error *err);

/* Record under `key`. A live record with another tp_size, dtype, group or group size
 * fails with TP_VALUE naming both values; an equal one is fine. A group whose size is
 * known and is not tp_size fails, and so does tp_size < 1. Recording again under the
 * same key replaces it. */
int tp_records_add(tp_records *records, int64_t key, const tp_record *record,
                   tp_error *err);

/* NULL when there is none. */
const tp_record *tp_records_find(const tp_records *records, int64_t key);

/* The record added last that is still alive, or NULL; its key in `key`. */
const tp_record *tp_records_latest(const tp_records *records, int64_t *key);

int tp_records_count(const tp_records *records);
void tp_records_remove(tp_records *records, int64_t key);
void tp_records_clear(tp_records *records);
void tp_records_free(tp_records *records);

#endif
