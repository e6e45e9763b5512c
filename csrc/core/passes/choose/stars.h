/* SPDX-License-Identifier: Apache-2.0 */
/* stars.h -- how the `*` of the patterns of a transformers plan are read. */
#ifndef TP_STARS_H
#define TP_STARS_H

#include "plan/plan_build.h"

/* Fill `stars`: a pattern that names nothing of the model with an index for each `*`,
 * and something with any text, is read in the second way. Adds a message about these.
 */
int tp_stars_read(tp_build *build, tp_error *err);

#endif
