/* SPDX-License-Identifier: Apache-2.0 */
/* model_input.h -- the bytes of a fuzzer, read as a model.
 *
 * Steps add modules: single ones, blocks of the family table, attention, experts,
 * layers with adapters, norms, names of tensors that are there. Names and sizes are
 * those that passes look for, now and then others. */
#ifndef TP_FUZZ_MODEL_INPUT_H
#define TP_FUZZ_MODEL_INPUT_H

#include "input.h"
#include "model_names.h"
#include "plan_fixture.h"
#include "rules/families.h"

enum { MOST_MODULES = 48, LONGEST_PART = 200 };

/* What a model is being made of. */
typedef struct {
    fixture *f;
    input *in;
    int modules;
} making;

/* Mostly a few heads of a few features, now and then what a size may be. */
static inline int64_t
take_features(input *in)
{
    static const int sizes[] = {4, 8, 12, 16, 24, 32, 48, 64,
                                1, 2, 3,  6,  33, 96, 0,  256};
    const int kind = take_byte(in);
    return kind < 248 ? sizes[kind % COUNT(sizes)] : take_size(in);
}

/* What 64 bits hold of it. */
static inline int64_t
times(int64_t a, int64_t b)
{
    return (int64_t)((uint64_t)a * (uint64_t)b);
}

static inline int
any_module(const making *at)
{
    return take_byte(at->in) % at->modules;
}

/* "parent.part"; the index of the module, or of one that is there already. */
static inline int
add_child(making *at, int parent, const char *part, tp_module_kind kind,
          const tp_integer *integers, int count)
{
    char name[LONGEST_PART];
    const char *of = tp_model_module(at->f->model, parent)->name;
    snprintf(name, sizeof(name), "%s%s%s", of, of[0] == '\0' ? "" : ".", part);
    for (int i = 0; i < at->modules; i++)
        if (strcmp(tp_model_module(at->f->model, i)->name, name) == 0)
            return i;
    if (at->modules == MOST_MODULES)
        return parent;
    const tp_module module = {
        .name = name,
        .class_name = model_classes[take_byte(at->in) % COUNT(model_classes)],
        .kind = kind,
        .integers = integers,
        .integer_count = count};
    int index = parent;
    if (is_done(tp_model_add_module(at->f->model, &module, &index, &at->f->err),
                &at->f->err))
        at->modules++;
    return index;
}

/* A parameter of any shape, which the model may refuse; its index, or -1. */
static inline int
add_tensor(making *at, int module, const char *leaf, int dims, const int64_t *shape,
           int tied_to)
{
    char name[2 * LONGEST_PART];
    snprintf(name, sizeof(name), "%s.%s", tp_model_module(at->f->model, module)->name,
             leaf);
    for (int i = 0; i < tp_model_parameter_count(at->f->model); i++)
        if (strcmp(tp_model_parameter(at->f->model, i)->name, name) == 0)
            return -1;
    tp_parameter parameter = {.name = name,
                              .leaf = leaf,
                              .module = module,
                              .dims = dims,
                              .dtype = "float32",
                              .itemsize = 4,
                              .tied_to = tied_to};
    for (int i = 0; i < dims && i < TP_MAX_DIMS; i++)
        parameter.shape[i] = shape[i];
    int index = -1;
    const int result =
        tp_model_add_parameter(at->f->model, &parameter, &index, &at->f->err);
    return is_done(result, &at->f->err) ? index : -1;
}

/* The dots of a name of the family table make modules between. */
static inline int
add_layer(making *at, int parent, const char *path, int64_t out, int64_t in)
{
    char part[64];
    const tp_module_kind kind =
        take_int(at->in, 0, 7) == 7 ? TP_MODULE_CONV1D : TP_MODULE_LINEAR;
    for (const char *dot = strchr(path, '.'); dot != NULL; dot = strchr(path, '.')) {
        snprintf(part, sizeof(part), "%.*s", (int)(dot - path), path);
        parent = add_child(at, parent, part, TP_MODULE_OTHER, NULL, 0);
        path = dot + 1;
    }
    const int module = add_child(at, parent, path, kind, NULL, 0);
    const int64_t shape[] = {kind == TP_MODULE_CONV1D ? in : out,
                             kind == TP_MODULE_CONV1D ? out : in};
    add_tensor(at, module, "weight", 2, shape, -1);
    if (take_int(at->in, 0, 3) == 3)
        add_tensor(at, module, "bias", 1, &out, -1);
    return module;
}

static inline int
take_integers(input *in, tp_integer *integers, int room)
{
    const int count = take_int(in, 0, room);
    for (int i = 0; i < count; i++) {
        integers[i].key = model_keys[take_byte(in) % COUNT(model_keys)];
        integers[i].value = take_features(in);
    }
    return count;
}

static inline void
step_module(making *at)
{
    tp_integer integers[4];
    const int parent = any_module(at);
    const char *part = model_parts[take_byte(at->in) % COUNT(model_parts)];
    const tp_module_kind kind =
        (tp_module_kind)take_int(at->in, 0, TP_MODULE_EXPERT_BLOCKS);
    const int count = take_integers(at->in, integers, COUNT(integers));
    add_child(at, parent, part, kind, integers, count);
}

static inline void
step_layer(making *at)
{
    const int parent = any_module(at);
    const char *part = model_parts[take_byte(at->in) % COUNT(model_parts)];
    const int64_t out = take_features(at->in);
    add_layer(at, parent, part, out, take_features(at->in));
}

/* A block of the table; with heads it is an attention module. */
static inline void
step_block(making *at)
{
    const tp_family_block *row =
        &tp_family_blocks[take_byte(at->in) % tp_family_block_count];
    const int64_t key = take_int(at->in, 1, 6), query = key * take_int(at->in, 1, 4);
    const int64_t head = 2 * take_int(at->in, 1, 8);
    const int64_t hidden = take_features(at->in);
    const tp_integer integers[] = {
        {"num_heads", query},
        {"num_key_value_heads", key},
        {"head_dim", head},
        {model_keys[take_byte(at->in) % COUNT(model_keys)], query * head}};
    int parent = any_module(at);
    const int64_t inner = row->heads ? query * head : take_features(at->in);
    parent = add_child(at, parent, row->heads ? "self_attn" : "mlp", TP_MODULE_OTHER,
                       integers, row->heads ? take_int(at->in, 0, 4) : 0);
    for (int i = 0; i < TP_FAMILY_INPUTS && row->inputs[i] != NULL; i++) {
        const bool fused = row->inputs[1] == NULL;
        const int64_t keys = row->heads ? key * head : inner;
        const int64_t out = row->heads && fused ? inner + 2 * keys
                            : i > 0             ? keys
                                                : inner;
        add_layer(at, parent, row->inputs[i],
                  fused && take_bool(at->in) ? times(2, inner) : out, hidden);
    }
    add_layer(at, parent, row->output, hidden, inner);
}

/* A module that holds experts as tensors. */
static inline void
step_experts(making *at)
{
    const tp_family_experts *row =
        &tp_family_experts_rows[take_byte(at->in) % tp_family_experts_count];
    const int64_t experts = take_int(at->in, 1, 9), hidden = take_features(at->in);
    const int64_t inner = take_features(at->in);
    const bool turned = take_bool(at->in);
    const tp_integer integers[] = {{"num_experts", experts}};
    const int parent = any_module(at);
    const tp_module_kind kind =
        (tp_module_kind)take_int(at->in, TP_MODULE_EXPERTS, TP_MODULE_EXPERT_BLOCKS);
    const int count = take_int(at->in, 0, 1);
    const int module = add_child(at, parent, "experts", kind, integers, count);
    const int64_t shapes[2][3] = {
        {experts, turned ? hidden : times(2, inner), turned ? times(2, inner) : hidden},
        {experts, turned ? inner : hidden, turned ? hidden : inner}};
    const int64_t stacked[] = {times(experts, inner), hidden};
    const char *leaves[] = {row->inputs[0], row->output};
    for (int i = 0; i < 2; i++) {
        if (row->form == TP_EXPERT_STACKS)
            add_tensor(at, module, leaves[i], 2, stacked, -1);
        else
            add_tensor(at, module, leaves[i], 3, shapes[i], -1);
        char bias[64];
        snprintf(bias, sizeof(bias), "%s_bias", leaves[i]);
        const int64_t sizes[] = {experts, shapes[i][turned ? 2 : 1]};
        if (take_bool(at->in))
            add_tensor(at, module, bias, 2, sizes, -1);
    }
    if (row->form == TP_EXPERT_STACKS && row->inputs[1] != NULL)
        add_tensor(at, module, row->inputs[1], 2, stacked, -1);
}

/* A layer with the factors of an adapter beside it. */
static inline void
step_adapter(making *at)
{
    static const char *const kinds[] = {"base_layer", "original_module",
                                        "modules_to_save.default"};
    const int64_t out = take_features(at->in), in = take_features(at->in);
    const int64_t rank = take_int(at->in, 1, 8);
    const int parent = any_module(at);
    const char *part = model_parts[take_byte(at->in) % COUNT(model_parts)];
    const int module = add_child(at, parent, part, TP_MODULE_OTHER, NULL, 0);
    const int kind = take_int(at->in, 0, 3);
    if (kind == 3) {
        add_layer(at, module, kinds[1], out, in);
        add_layer(at, module, kinds[2], out, in);
        return;
    }
    add_layer(at, module, kinds[kind], out, in);
    add_layer(at, module, "lora_A.default", rank, in);
    add_layer(at, module, "lora_B.default", out, rank);
    const int dropouts =
        add_child(at, module, "lora_dropout", TP_MODULE_OTHER, NULL, 0);
    add_child(at, dropouts, "default", TP_MODULE_OTHER, NULL, 0);
}

static inline void
step_tensor(making *at)
{
    int64_t shape[TP_MAX_DIMS + 1];
    const int module = any_module(at);
    const char *leaf = model_leaves[take_byte(at->in) % COUNT(model_leaves)];
    const int dims =
        take_int(at->in, 0, 31) == 31 ? TP_MAX_DIMS + 1 : take_int(at->in, 0, 4);
    for (int i = 0; i < dims; i++)
        shape[i] = take_features(at->in);
    add_tensor(at, module, leaf, dims, shape, -1);
}

/* Another name of a tensor that is there. */
static inline void
step_tie(making *at)
{
    const int count = tp_model_parameter_count(at->f->model);
    const int module = any_module(at);
    if (count == 0)
        return;
    const int first = take_byte(at->in) % count;
    const tp_parameter *of = tp_model_parameter(at->f->model, first);
    add_tensor(at, module, of->leaf, of->dims, of->shape, first);
}

static inline void
step_embedding(making *at)
{
    const int parent = any_module(at);
    const char *part = model_parts[take_byte(at->in) % COUNT(model_parts)];
    int64_t shape[2];
    shape[0] = take_features(at->in);
    shape[1] = take_features(at->in);
    const int module = add_child(at, parent, part, TP_MODULE_EMBEDDING, NULL, 0);
    add_tensor(at, module, "weight", 2, shape, -1);
    if (take_bool(at->in))
        at->f->facts.input_embedding = module;
}

/* Modules and what is known of the model; at least the model itself. */
static inline void
take_model(fixture *f, input *in)
{
    static void (*const steps[])(making *) = {
        step_module,  step_layer,  step_block, step_block,    step_experts,
        step_adapter, step_tensor, step_tie,   step_embedding};
    static tp_integer facts[4];
    making at = {f, in, 0};
    const tp_module root = {.name = "", .class_name = "Model"};
    int index = 0;
    REQUIRE(tp_model_add_module(f->model, &root, &index, &f->err) == 0);
    at.modules = 1;
    const int type = take_byte(in);
    f->facts.model_type = type < COUNT(model_types) ? model_types[type] : NULL;
    f->facts.prefix = take_bool(in) ? "model" : "";
    f->facts.takes_labels = take_bool(in);
    f->facts.integer_count = take_integers(in, facts, COUNT(facts));
    memcpy(f->integers, facts, sizeof(facts));
    for (int left = take_int(in, 0, 24); left > 0 && in->left > 0; left--)
        steps[take_byte(in) % COUNT(steps)](&at);
    const int head = take_byte(in);
    f->facts.output_head = head < at.modules ? head : -1;
}

#endif
