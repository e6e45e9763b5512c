/* SPDX-License-Identifier: Apache-2.0 */
/* rank_memory.h -- the method Plan.rank_memory. */
#ifndef PY_RANK_MEMORY_H
#define PY_RANK_MEMORY_H

#include "python/module.h"

#include "core/plan/plan.h"

extern const char py_rank_memory_doc[];

/* New dict, or NULL. */
PyObject *py_rank_memory(const tp_plan *plan, PyObject *args, PyObject *kwargs);

#endif
