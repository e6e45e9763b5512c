/* SPDX-License-Identifier: Apache-2.0 */
/* family.c -- the table of blocks that are known by their names, as Python values. */
#include "python/module.h"

#include "core/rules/families.h"

#include "python/args.h"

const char py_family_blocks_doc[] =
    "family_blocks()\n--\n\n"
    "(output, inputs, heads, model type or None) of each block, first match first.";

/* New. */
static PyObject *
input_tuple(const tp_family_block *block)
{
    int count = 0;
    while (count < TP_FAMILY_INPUTS && block->inputs[count] != NULL)
        count++;
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++)
        py_tuple_put(&tuple, i, PyUnicode_FromString(block->inputs[i]));
    return tuple;
}

PyObject *
py_family_blocks(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *tuple = PyTuple_New(tp_family_block_count);
    for (int i = 0; tuple != NULL && i < tp_family_block_count; i++) {
        const tp_family_block *block = &tp_family_blocks[i];
        PyObject *inputs = input_tuple(block);
        if (inputs == NULL)
            Py_CLEAR(tuple);
        else
            py_tuple_put(
                &tuple, i,
                Py_BuildValue("sNNz", block->output, inputs,
                              PyBool_FromLong(block->heads), block->model_type));
    }
    return tuple;
}
