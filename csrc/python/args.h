/* SPDX-License-Identifier: Apache-2.0 */
/* args.h -- Python arguments to C values, and C errors to exceptions.
 *
 * `what` is the name of the argument as the user wrote it, which every message
 * starts with; NULL where py_raised_at puts the place in front. Each function returns
 * 0, or -1 with an exception set: TypeError for a wrong type, ValueError for a wrong
 * value. */
#ifndef PY_ARGS_H
#define PY_ARGS_H

#include "python/module.h"

#include <stdbool.h>
#include <stdint.h>

#include "core/base/error.h"

/* The one place that turns an error into an exception. Clears `err`, returns
 * NULL. */
void *py_raise(tp_error *err);

/* TypeError "<what>: expected <expected>, got <type>". Always returns -1. */
int py_wrong_type(PyObject *object, const char *what, const char *expected);

/* Put "<where>: " before the message of the exception that is set, if it is a
 * plain TypeError or ValueError; `where` comes from a PyUnicode_FromFormat
 * format. Always returns -1. */
int py_raised_at(const char *format, ...);

/* Make `cause`, which is stolen, the cause of the exception that is set. */
void py_set_cause(PyObject *cause);

/* TypeError for a keyword-only argument that has no default and was not given. */
int py_check_required(PyObject *object, const char *name);

/* UTF-8 without null characters, borrowed from `object`. */
int py_read_text(PyObject *object, const char *what, const char **out);

/* As py_read_text; None or no argument (NULL) gives NULL. */
int py_read_optional_text(PyObject *object, const char *what, const char **out);

/* An int that is not a bool; `object` NULL leaves `out` as it is. */
int py_read_int64(PyObject *object, const char *what, int64_t *out);
int py_read_int(PyObject *object, const char *what, int *out);

/* The ints of a tuple into `values`, which has room for them. */
int py_read_int64s(PyObject *items, const char *what, int64_t *values);

/* True or False, nothing that merely counts as such; NULL as above. */
int py_read_flag(PyObject *object, const char *what, bool *out);

/* A new tuple of the items of a list, a tuple or another sequence that is no
 * string, or NULL. */
PyObject *py_read_sequence(PyObject *object, const char *what);

/* TypeError unless `object` is a tuple of `size`; `items` describes it: "a tuple
 * (name, shape)". */
int py_check_tuple(PyObject *object, const char *what, Py_ssize_t size,
                   const char *items);

/* A dict with the items of a mapping, new or the same one, or NULL. */
PyObject *py_read_mapping(PyObject *object, const char *what);

/* A sequence of str. */
typedef struct {
    PyObject *owner; /* strong: the tuple that keeps the strings */
    const char **items;
    int count;
} py_texts;

#define PY_NO_TEXTS   \
    {                 \
        NULL, NULL, 0 \
    }

int py_texts_read(py_texts *texts, PyObject *object, const char *what);
void py_texts_clear(py_texts *texts);

/* Put `item`, which is stolen, into a tuple that is being filled. Where `item` is
 * NULL the tuple goes and becomes NULL. */
void py_tuple_put(PyObject **tuple, Py_ssize_t index, PyObject *item);

/* A new tuple of ints, or NULL. */
PyObject *py_int_tuple(const int64_t *values, int count);

#endif
