/* SPDX-License-Identifier: Apache-2.0 */
/* sequence.c -- where the tokens of a batch are sharded over the ranks. */
#include "passes/output/sequence.h"

#include <stdlib.h>
#include <string.h>

#include "base/text.h"
#include "model/names.h"
#include "passes/output/stacks.h"
#include "rules/hf_tp_plan.h"

typedef enum {
    NOWHERE,
    GATHER_INPUT,  /* all tokens are gathered where it begins */
    GATHER_SCATTER /* and sharded again where it ends */
} role;

/* What models call what a layer takes of each token beside its hidden states:
 * embeddings of Gemma-3n and 4, the first hidden states of Zamba. */
static const char *const token_arguments[] = {"per_layer_input",
                                              "original_hidden_states"};

/* Modules that have full matrices and yet take tokens one by one: they mix streams. */
static const char *const mixes_streams[] = {
    "altup", "attn_hc", "ffn_hc", "attn_hyper_connection", "mlp_hyper_connection"};

/* Of these the one whose streams are the first dimension of the hidden states. */
static const char first_streams[] = "altup";

typedef struct {
    tp_stacks stacks;
    role *roles; /* one per module */
} places;

static int
refuse(const places *at, int module, const char *why, tp_error *err)
{
    const tp_module *is = tp_model_module(at->stacks.build->model, module);
    return tp_fail(err, TP_VALUE,
                   "tensor_parallel.sequence_parallel is true, but '%s' %s. Leave the "
                   "key out",
                   is->name[0] == '\0' ? is->class_name : is->name, why);
}

static bool
is_stack_layer(const places *at, int module)
{
    return tp_stacks_layer(&at->stacks, module) == module;
}

/* The nearest module that has a role and that a module is or is inside of, below its
 * layer of the stack; -1 for none. */
static int
around(const places *at, int module)
{
    const int layer = tp_stacks_layer(&at->stacks, module);
    for (int m = module; m != layer; m = tp_stacks_parent(&at->stacks, m)) {
        if (at->roles[m] != NOWHERE)
            return m;
    }
    return -1;
}

/* Give all tokens to the child of the layer that `module` is or is inside of. */
static void
mark_gather_scatter(const places *at, int module)
{
    at->roles[tp_stacks_block(&at->stacks, module)] = GATHER_SCATTER;
}

static bool
is_token_wise(const places *at, int module)
{
    const char *leaf = tp_names_leaf(
        tp_model_module(at->stacks.build->model, tp_stacks_block(&at->stacks, module))
            ->name);
    for (size_t i = 0; i < sizeof(mixes_streams) / sizeof(*mixes_streams); i++) {
        if (tp_text_same(leaf, mixes_streams[i]))
            return true;
    }
    return false;
}

/* Within a block that a row layer closes, all tokens are there. Elsewhere the sum over
 * the ranks needs the same tokens on all of them. */
static void
mark_split_row(const places *at, int module)
{
    const int block = tp_stacks_block(&at->stacks, module);
    if (at->stacks.columns[block] && at->stacks.rows[block] == 0 &&
        !is_token_wise(at, module))
        at->roles[block] = GATHER_SCATTER;
    else if (at->stacks.rows[block] == 0 ||
             tp_stacks_is_behind_row(&at->stacks, module,
                                     tp_stacks_layer(&at->stacks, module)))
        at->roles[module] = GATHER_SCATTER;
}

static int
mark_layers(const places *at, tp_error *err)
{
    const tp_plan *plan = at->stacks.build->plan;
    for (int i = 0; i < plan->layer_count; i++) {
        const int module = plan->layers[i].module;
        const int layer = tp_stacks_layer(&at->stacks, module);
        const tp_kind kind = plan->layers[i].kind;
        if (layer < 0)
            continue;
        if (kind == TP_VOCABULARY || kind == TP_HIDDEN)
            return refuse(at, module, "is no layer around which tokens can be sharded",
                          err);
        if (tp_stacks_are_experts(&plan->layers[i]))
            mark_gather_scatter(at, module);
        if (kind == TP_ROW && plan->layers[i].split_input)
            mark_split_row(at, module);
        if (kind != TP_COLUMN || !at->stacks.columns[module])
            continue;
        /* Full outputs that no row layer sums. */
        const int block = tp_stacks_block(&at->stacks, module);
        if (plan->layers[i].gather_output && at->stacks.rows[block] == 0) {
            at->roles[is_token_wise(at, module) ? module : block] = GATHER_SCATTER;
            continue;
        }
        const int gathering = tp_stacks_gather_input(&at->stacks, &plan->layers[i]);
        if (at->roles[gathering] == NOWHERE)
            at->roles[gathering] = GATHER_INPUT;
    }
    return 0;
}

/* Blocks that need all tokens where their row layers end, too, as those that add their
 * input to the output of one. A block that ends elsewhere cannot scatter its output. */
static int
mark_all_tokens(const places *at, tp_error *err)
{
    const tp_build *build = at->stacks.build;
    for (int i = 0; i < build->options->all_tokens_count; i++) {
        const char *pattern = build->options->all_tokens[i];
        bool found = false;
        for (int m = 0; m < tp_model_module_count(build->model); m++) {
            const char *name = tp_model_module(build->model, m)->name;
            if (at->stacks.rows[m] != TP_HOLDS_ROW ||
                tp_stacks_layer(&at->stacks, m) < 0 || is_stack_layer(at, m) ||
                !tp_hf_plan_match(pattern, "", name, TP_STARS_INDICES))
                continue;
            at->roles[m] = GATHER_SCATTER;
            found = true;
        }
        if (!found)
            return tp_fail(err, TP_VALUE,
                           "all_tokens[%d]: '%s' is no block of a layer that ends in a "
                           "row layer",
                           i, pattern);
    }
    return 0;
}

/* Whether a vector is the bias of a row layer beside it, which the block gives on with
 * its output, as in GPT-NeoX-Japanese. */
static bool
is_bias_of_row(const places *at, const tp_parameter *parameter)
{
    const tp_model *model = at->stacks.build->model;
    const char *const end = strrchr(parameter->leaf, '_');
    if (parameter->dims != 1 || end == NULL || !tp_text_same(end, "_bias"))
        return false;
    for (int m = parameter->module + 1; m < tp_model_module_count(model); m++) {
        const char *leaf = tp_names_leaf(tp_model_module(model, m)->name);
        if (tp_stacks_parent(&at->stacks, m) == parameter->module &&
            at->stacks.rows[m] == TP_IS_ROW &&
            strlen(leaf) == (size_t)(end - parameter->leaf) &&
            strncmp(leaf, parameter->leaf, strlen(leaf)) == 0)
            return true;
    }
    return false;
}

/* Whether a parameter of a stack is used on this rank's own tokens alone. */
static bool
is_local(const places *at, const tp_parameter *parameter)
{
    const int role_of = around(at, parameter->module);
    if (role_of >= 0 && at->roles[role_of] == GATHER_SCATTER)
        return false;
    const int top =
        role_of >= 0 ? role_of : tp_stacks_layer(&at->stacks, parameter->module);
    return role_of < 0 || is_bias_of_row(at, parameter) ||
           tp_stacks_is_behind_row(&at->stacks, parameter->module, top);
}

/* A norm or a scale takes tokens one by one. What has a full matrix may mix them, as
 * attention that stays replicated does, and gets all of them. */
static void
mark_replicated_blocks(const places *at)
{
    const tp_plan *plan = at->stacks.build->plan;
    for (int i = 0; i < plan->entry_count; i++) {
        const tp_parameter *is = tp_model_parameter(at->stacks.build->model, i);
        const int layer = tp_stacks_layer(&at->stacks, is->module);
        if (layer >= 0 && layer != is->module && plan->entries[i].layout == NULL &&
            is->dims > 1 && is_local(at, is) && !is_token_wise(at, is->module) &&
            !tp_stacks_is_behind_row(&at->stacks, is->module, layer))
            mark_gather_scatter(at, is->module);
    }
}

/* What is in a module that gathers all tokens has no role of its own. */
static void
drop_nested(const places *at)
{
    for (int m = tp_model_module_count(at->stacks.build->model) - 1; m >= 0; m--) {
        const int layer = tp_stacks_layer(&at->stacks, m);
        if (at->roles[m] != NOWHERE) {
            const int parent = tp_stacks_parent(&at->stacks, m);
            if (parent != layer && around(at, parent) >= 0)
                at->roles[m] = NOWHERE;
        }
    }
}

static bool
is_summed(const places *at, int entry)
{
    const tp_parameter *is = tp_model_parameter(at->stacks.build->model, entry);
    return tp_stacks_layer(&at->stacks, is->module) >= 0 &&
           at->stacks.build->plan->entries[entry].layout == NULL && is_local(at, is);
}

/* Let the gradients be summed of what is used on own tokens alone. One tensor has one
 * gradient, whatever its names are. */
static int
settle_parameters(const places *at, tp_error *err)
{
    const tp_plan *plan = at->stacks.build->plan;
    for (int i = 0; i < plan->entry_count; i++) {
        const tp_parameter *is = tp_model_parameter(at->stacks.build->model, i);
        const bool summed = is_summed(at, i);
        if (is->tied_to >= 0 && summed != is_summed(at, is->tied_to))
            return refuse(at, is->module,
                          "has a weight in common with a module that is given other "
                          "tokens",
                          err);
        if (summed)
            plan->entries[i].kind = TP_REPLICATED_SUM;
    }
    return 0;
}

typedef bool (*choice)(const places *at, int module);

static bool
gathers_input(const places *at, int module)
{
    return at->roles[module] == GATHER_INPUT;
}

static bool
gathers_and_scatters(const places *at, int module)
{
    return at->roles[module] == GATHER_SCATTER;
}

static bool
reduces_and_scatters(const places *at, int module)
{
    if (at->stacks.rows[module] != TP_IS_ROW)
        return false;
    const int role_of = around(at, module);
    return role_of < 0 || at->roles[role_of] == GATHER_INPUT;
}

/* The modules of the stack in `list` that are what is wanted. */
static int
choose(const places *at, int list, choice wanted, tp_modules *out, tp_error *err)
{
    const int count = tp_model_module_count(at->stacks.build->model);
    tp_arena *arena = at->stacks.build->plan->arena;
    int *items = tp_arena_take(arena, (size_t)count, sizeof(*items), err);
    if (items == NULL)
        return -1;
    *out = (tp_modules){items, 0};
    for (int m = list + 1; m < count && tp_stacks_parent(&at->stacks, m) >= list; m++) {
        if (tp_stacks_layer(&at->stacks, m) >= 0 && wanted(at, m))
            items[out->count++] = m;
    }
    return 0;
}

/* The norms that the owner of `list` has behind it, up to its next list. */
static int
choose_norms(const places *at, int list, tp_modules *out, tp_error *err)
{
    const int count = tp_model_module_count(at->stacks.build->model);
    int *items = tp_arena_take(at->stacks.build->plan->arena, (size_t)count,
                               sizeof(*items), err);
    if (items == NULL)
        return -1;
    *out = (tp_modules){items, 0};
    for (int m = list + 1; m < count; m++) {
        if (tp_stacks_parent(&at->stacks, m) != tp_stacks_parent(&at->stacks, list))
            continue;
        if (at->stacks.lists[m])
            break; /* a norm is behind one list */
        if (tp_stacks_is_norm(&at->stacks, m))
            items[out->count++] = m;
    }
    return 0;
}

static bool
has_first_streams(const places *at, const tp_modules *layers)
{
    const tp_model *model = at->stacks.build->model;
    for (int i = 0; i < layers->count; i++) {
        for (int m = layers->items[i] + 1; m < tp_model_module_count(model); m++) {
            if (tp_stacks_parent(&at->stacks, m) == layers->items[i] &&
                tp_text_same(tp_names_leaf(tp_model_module(model, m)->name),
                             first_streams))
                return true;
        }
    }
    return false;
}

static int
write_stacks(const places *at, int lists, tp_error *err)
{
    tp_plan *plan = at->stacks.build->plan;
    plan->stacks =
        tp_arena_take(plan->arena, (size_t)lists, sizeof(*plan->stacks), err);
    if (plan->stacks == NULL)
        return -1;
    for (int m = 0; m < tp_model_module_count(at->stacks.build->model); m++) {
        if (!at->stacks.lists[m])
            continue;
        tp_stack *stack = &plan->stacks[plan->stack_count++];
        const int parent = tp_stacks_parent(&at->stacks, m);
        stack->owner = parent < 0 ? m : parent;
        stack->token_arguments = token_arguments;
        stack->token_argument_count =
            (int)(sizeof(token_arguments) / sizeof(*token_arguments));
        if (choose(at, m, is_stack_layer, &stack->layers, err) < 0 ||
            choose(at, m, gathers_input, &stack->gather_input, err) < 0 ||
            choose(at, m, reduces_and_scatters, &stack->reduce_scatter_output, err) <
                0 ||
            choose(at, m, gathers_and_scatters, &stack->gather_scatter, err) < 0 ||
            choose_norms(at, m, &stack->norms, err) < 0)
            return -1;
        stack->streams_first = has_first_streams(at, &stack->layers);
    }
    return 0;
}

static int
make(const places *at, int lists, tp_error *err)
{
    if (lists == 0)
        return refuse(at, 0, "has no list of layers with row layers or experts in it",
                      err);
    if (mark_layers(at, err) < 0 || mark_all_tokens(at, err) < 0)
        return -1;
    mark_replicated_blocks(at);
    drop_nested(at);
    if (settle_parameters(at, err) < 0)
        return -1;
    return write_stacks(at, lists, err);
}

int
tp_sequence_make(tp_build *build, tp_error *err)
{
    if (!build->options->sequence)
        return 0;
    const size_t modules = (size_t)tp_model_module_count(build->model) + 1;
    places at = {.roles = calloc(modules, sizeof(*at.roles))};
    int lists = 0;
    int result = at.roles == NULL ? tp_fail_memory(err)
                                  : tp_stacks_find(build, &at.stacks, &lists, err);
    if (result == 0)
        result = make(&at, lists, err);
    tp_stacks_clear(&at.stacks);
    free(at.roles);
    return result;
}
