/* SPDX-License-Identifier: Apache-2.0 */
/* model.h -- a model as names, shapes and integers.
 *
 * What the plan is made from. Holds no tensor; everything is copied in. */
#ifndef TP_MODEL_H
#define TP_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/limits.h"

typedef enum {
    TP_MODULE_OTHER,
    TP_MODULE_LINEAR, /* weight [out, in] */
    TP_MODULE_CONV1D, /* weight [in, out], as in GPT-2 */
    TP_MODULE_EMBEDDING,
    TP_MODULE_EXPERTS, /* experts as tensors, of which it runs those that a token names
                        */
    TP_MODULE_EXPERT_BLOCKS /* the same, given a block of rows for each expert */
} tp_module_kind;

/* An integer attribute: of a module, or of the model's configuration. */
typedef struct {
    const char *key;
    int64_t value;
} tp_integer;

typedef struct {
    const char *name; /* "" is the model itself */
    const char *class_name;
    tp_module_kind kind;
    int parent; /* index, or -1 for the model itself; filled by tp_model_seal */
    const tp_integer *integers;
    int integer_count;
} tp_module;

/* Whether the module's forward can be exchanged: it has one weight and maybe a bias. */
bool tp_module_is_layer(const tp_module *module);

typedef struct {
    const char *name;
    const char *leaf; /* "weight" */
    int module;       /* the module it is in */
    int dims;
    int64_t shape[TP_MAX_DIMS];
    const char *dtype; /* canonical name */
    int itemsize;      /* bytes per element */
    int tied_to;       /* index of the first name of the same tensor, or -1 */
} tp_parameter;

typedef struct tp_model tp_model;

/* Bytes of all parameters of a model: what follows from its sizes, such as the states
 * of an optimizer, then fits 64 bits. */
#define TP_MOST_BYTES (INT64_C(1) << 56)

int tp_model_new(tp_model **out, tp_error *err);

/* Modules come before their parameters, parents before children. Strings and
 * integers are copied. Returns 0 and writes the index to `index`. */
int tp_model_add_module(tp_model *model, const tp_module *module, int *index,
                        tp_error *err);

/* `name`, `leaf` and `dtype` are copied. Fails with TP_VALUE on more than
 * TP_MAX_DIMS dimensions and where the parameters come to more than TP_MOST_BYTES. */
int tp_model_add_parameter(tp_model *model, const tp_parameter *parameter, int *index,
                           tp_error *err);

/* What stands in the model's configuration; NULL or "" and -1 where unknown. */
typedef struct {
    const char *model_type;
    const char *prefix; /* base-model prefix */
    const tp_integer *integers;
    int integer_count;
    int input_embedding; /* module index */
    int output_head;     /* module index */
    bool takes_labels;   /* the model's forward does */
} tp_model_facts;

/* Copy the facts in, find every parent, end the building. */
int tp_model_seal(tp_model *model, const tp_model_facts *facts, tp_error *err);

int tp_model_module_count(const tp_model *model);
int tp_model_parameter_count(const tp_model *model);
const tp_module *tp_model_module(const tp_model *model, int index);
const tp_parameter *tp_model_parameter(const tp_model *model, int index);
const tp_model_facts *tp_model_get_facts(const tp_model *model);

/* Elements of a parameter, and of all of them, a tensor of several names once. */
int64_t tp_parameter_elements(const tp_parameter *parameter);
int64_t tp_model_elements(const tp_model *model);

/* The module whose name has the first `size` bytes of `name`, or -1. */
int tp_model_find_module(const tp_model *model, const char *name, size_t size);

/* The parameter `leaf` of module `index`, or -1. */
int tp_model_find_parameter(const tp_model *model, int module, const char *leaf);

/* The parameters that are in module `module` directly, -1 behind the last. */
int tp_model_first_parameter(const tp_model *model, int module);
int tp_model_next_parameter(const tp_model *model, int parameter);

/* Whether `module` is `top`, or a module inside of it. */
bool tp_model_is_inside(const tp_model *model, int module, int top);

/* Value of the first of the NULL-terminated `keys` that a module has, or -1. */
int64_t tp_model_integer(const tp_integer *integers, int count,
                         const char *const *keys);

void tp_model_free(tp_model *model);

#endif
