/* SPDX-License-Identifier: Apache-2.0 */
/* records.h -- the tuple form of a record: (tp_size, dtype, group, group_size). */
#ifndef PY_RECORDS_H
#define PY_RECORDS_H

#include "python/module.h"

#include "core/config/recorded_args.h"

/* Read a tuple; messages start with "record". */
int py_record_read(PyObject *tuple, tp_record *out);

#endif
