/* SPDX-License-Identifier: Apache-2.0 */
/* module_styles.h -- styles of a transformers plan that speak of modules, not of
 * weights. */
#ifndef TP_MODULE_STYLES_H
#define TP_MODULE_STYLES_H

#include "plan/plan_build.h"

/* Fill `module_rules` with the first rule that names each module, if it has a style
 * of its own, and mark the rule as matched. Adds a message about a style that is not
 * known. */
int tp_module_styles_choose(tp_build *build, tp_error *err);

#endif
