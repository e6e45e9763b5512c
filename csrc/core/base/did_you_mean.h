/* SPDX-License-Identifier: Apache-2.0 */
/* did_you_mean.h -- the names closest to an unknown name.
 *
 * Distance is the optimal string alignment distance (insert, delete, replace,
 * swap neighbours), without regard to case. */
#ifndef TP_DID_YOU_MEAN_H
#define TP_DID_YOU_MEAN_H

#include "base/text.h"

/* Indices of up to `limit` of the `count` names, nearest first, whose distance
 * is at most a third of the longer name (at least 2), or which contain `name`
 * or are contained in it. Equal distances keep the order of `names`. Writes them to
 * `found` and returns how many. Names over 128 bytes are never near. */
int tp_did_you_mean(const char *name, const char *const *names, int count, int limit,
                    int *found);

/* Append `; did you mean 'a' or 'b'?` where anything is near, else the whole
 * list as `; known: a, b, c`. */
void tp_did_you_mean_add(tp_text *text, const char *name, const char *const *names,
                         int count);

#endif
