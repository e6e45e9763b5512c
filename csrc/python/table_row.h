/* SPDX-License-Identifier: Apache-2.0 */
/* table_row.h -- rows of the table that shows a plan. */
#ifndef PY_ROW_H
#define PY_ROW_H

#include "python/module.h"

/* A new tuple of Row for the plan of `holder`, or NULL. */
PyObject *py_row_table(py_state *state, PyObject *holder);

#endif
