/* SPDX-License-Identifier: Apache-2.0 */
/* model.h -- what a plan needs of the type Model. */
#ifndef PY_MODEL_H
#define PY_MODEL_H

#include "python/module.h"

#include "core/model/model.h"

/* Borrowed from `model`, which is a Model and never changes. */
const tp_model *py_model_get(PyObject *model);

/* The arguments of Model; borrowed, NULL when not given. */
typedef struct {
    PyObject *modules, *parameters, *model_type, *prefix, *integers;
    PyObject *input_embedding, *output_head, *takes_labels;
} py_model_arguments;

/* Fill and seal `model`. Messages name the item: "parameters[3]: ...". */
int py_model_read(const py_model_arguments *given, tp_model *model);

#endif
