/* SPDX-License-Identifier: Apache-2.0 */
/* head_counts.h -- head counts under names that geometry.c does not know.
 *
 * A guess from the integers of one module and the sizes of its layers, which a run of
 * the model has to confirm. Decides nothing about a weight. */
#ifndef TP_HEAD_COUNTS_H
#define TP_HEAD_COUNTS_H

#include <stdbool.h>

#include "layout/layout.h"
#include "model/model.h"

/* What an integer of such a module says. */
typedef enum {
    TP_COUNTS_NOTHING,
    TP_COUNTS_QUERY_HEADS,
    TP_COUNTS_KEY_HEADS,
    TP_COUNTS_GROUP,       /* query heads per key head */
    TP_COUNTS_QUERY_WIDTH, /* features of all query heads */
    TP_COUNTS_KEY_WIDTH,
    TP_COUNTS_KINDS
} tp_head_count;

/* The head counts of an attention module whose queries have `query_width` features and
 * whose keys have `key_width`. False where no integer can be the count of query heads,
 * or where several can and nothing speaks for one of them. */
bool tp_head_counts_guess(const tp_module *module, int64_t query_width,
                          int64_t key_width, tp_heads *heads, int64_t *head_size);

/* What an integer says of a module with these heads. */
tp_head_count tp_head_counts_meaning(const tp_integer *integer, tp_heads heads,
                                     int64_t head_size);

#endif
