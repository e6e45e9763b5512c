/* SPDX-License-Identifier: Apache-2.0 */
/* tp_size.h -- the TP size that everything that states it agrees on.
 *
 * No source wins over another: two that differ are an error that names all. */
#ifndef TP_SIZE_H
#define TP_SIZE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "base/text.h"

typedef struct {
    const char *where; /* as the user wrote it: "tensor_parallel.autotp_size" */
    int64_t size;      /* 0 and 1 leave the model unsharded; -1: not stated */
} tp_size_source;

/* Whether two sources differ. */
bool tp_size_differs(const tp_size_source *sources, int count);

/* Add "TP size: A is 4, B is 4, but C is 2" for the sources that state one. */
void tp_size_add_sources(tp_text *text, const tp_size_source *sources, int count);

/* The size that is stated, 1 for 0, or -1 where no source states one. Fails with
 * TP_VALUE, naming all sources, where two differ. */
int tp_size_settle(const tp_size_source *sources, int count, int64_t *size,
                   tp_error *err);

#endif
