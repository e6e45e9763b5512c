/* SPDX-License-Identifier: Apache-2.0 */
/* subject.h -- a name that rules are tried on, looked at once for all of them. */
#ifndef TP_SUBJECT_H
#define TP_SUBJECT_H

#include <stdbool.h>
#include <stddef.h>

#include "rules/pairs.h"

typedef struct {
    const char *text; /* borrowed: UTF-8, NULs included */
    size_t size;
    tp_pairs pairs;
    bool printable; /* printable ASCII and nothing else */
} tp_subject;

tp_subject tp_subject_of(const char *text, size_t size);

/* As tp_subject_of, sooner where `text` begins with the text of `start`. */
tp_subject tp_subject_after(const tp_subject *start, const char *text, size_t size);

#endif
