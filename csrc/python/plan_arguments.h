/* SPDX-License-Identifier: Apache-2.0 */
/* plan_arguments.h -- what a Plan is made from. */
#ifndef PY_PLAN_ARGUMENTS_H
#define PY_PLAN_ARGUMENTS_H

#include "python/module.h"

#include "core/plan/plan.h"
#include "python/args.h"

typedef struct {
    PyObject *model; /* borrowed: a Model */
    PyObject *rules; /* borrowed: Rules */
    tp_plan_options options;
    py_texts heads, replicated, individual, all_tokens,
        large; /* which the options borrow */
} py_plan_arguments;

/* `out` starts as zeros. Returns 0, or -1 with an exception set. */
int py_plan_arguments_read(const py_state *state, PyObject *args, PyObject *kwargs,
                           py_plan_arguments *out);

void py_plan_arguments_clear(py_plan_arguments *given);

#endif
