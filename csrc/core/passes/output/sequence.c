/* SPDX-License-Identifier: Apache-2.0 */
/* sequence.c -- where the tokens of a batch are sharded over the ranks. */
#include "passes/output/sequence.h"

#include <stdlib.h>

#include "passes/output/stacks.h"

typedef enum {
    NOWHERE,
    INLET, /* all tokens are gathered where it begins */
    ISLAND /* and sharded again where it ends */
} role;

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

/* The nearest module below its stage that has a role and that a module is or is inside
 * of; -1 for none. */
static int
around(const places *at, int module)
{
    const int stage = tp_stacks_stage(&at->stacks, module);
    for (int m = module; m != stage; m = tp_stacks_parent(&at->stacks, m)) {
        if (at->roles[m] != NOWHERE)
            return m;
    }
    return -1;
}

/* Give all tokens to the child of the stage that `module` is or is inside of. */
static void
mark_island(const places *at, int module)
{
    at->roles[tp_stacks_block(&at->stacks, module)] = ISLAND;
}

static int
mark_layers(const places *at, tp_error *err)
{
    const tp_plan *plan = at->stacks.build->plan;
    for (int i = 0; i < plan->layer_count; i++) {
        const int module = plan->layers[i].module;
        const int stage = tp_stacks_stage(&at->stacks, module);
        const tp_kind kind = plan->layers[i].kind;
        if (stage < 0)
            continue;
        if (module == stage || kind == TP_VOCABULARY || kind == TP_HIDDEN)
            return refuse(at, module, "is no layer around which tokens can be sharded",
                          err);
        if (kind == TP_EXPERTS || kind == TP_EXPERTS_COLUMN || kind == TP_EXPERTS_ROW)
            mark_island(at, module);
        if (kind != TP_COLUMN || !at->stacks.columns[module])
            continue;
        /* Full outputs that no row layer sums. */
        if (plan->layers[i].gather_output &&
            at->stacks.rows[tp_stacks_block(&at->stacks, module)] == 0)
            mark_island(at, module);
        const int inlet = tp_stacks_inlet(&at->stacks, &plan->layers[i]);
        if (at->roles[inlet] == NOWHERE)
            at->roles[inlet] = INLET;
    }
    return 0;
}

/* Whether a parameter of a stage is used on a part of the tokens. */
static bool
is_local(const places *at, const tp_parameter *parameter)
{
    const int role_of = around(at, parameter->module);
    if (role_of >= 0 && at->roles[role_of] == ISLAND)
        return false;
    const int top =
        role_of >= 0 ? role_of : tp_stacks_stage(&at->stacks, parameter->module);
    return role_of < 0 || tp_stacks_is_behind_row(&at->stacks, parameter->module, top);
}

/* A norm or a scale takes tokens one by one. What has a full matrix may mix them, as
 * attention that stays replicated does, and gets all of them. */
static void
mark_replicated_blocks(const places *at)
{
    const tp_plan *plan = at->stacks.build->plan;
    for (int i = 0; i < plan->entry_count; i++) {
        const tp_parameter *is = tp_model_parameter(at->stacks.build->model, i);
        const int stage = tp_stacks_stage(&at->stacks, is->module);
        if (stage >= 0 && stage != is->module && plan->entries[i].layout == NULL &&
            is->dims > 1 && is_local(at, is) &&
            !tp_stacks_is_behind_row(&at->stacks, is->module, stage))
            mark_island(at, is->module);
    }
}

/* What is in an inlet or island has no role of its own. */
static void
drop_nested(const places *at)
{
    for (int m = tp_model_module_count(at->stacks.build->model) - 1; m >= 0; m--) {
        const int stage = tp_stacks_stage(&at->stacks, m);
        if (at->roles[m] != NOWHERE && m != stage) {
            const int parent = tp_stacks_parent(&at->stacks, m);
            if (parent != stage && around(at, parent) >= 0)
                at->roles[m] = NOWHERE;
        }
    }
}

static bool
is_summed(const places *at, int entry)
{
    const tp_parameter *is = tp_model_parameter(at->stacks.build->model, entry);
    return tp_stacks_stage(&at->stacks, is->module) >= 0 &&
           at->stacks.build->plan->entries[entry].layout == NULL && is_local(at, is);
}

/* Let the gradients be summed of what is used on a part of the tokens. One tensor has
 * one gradient, whatever its names are. */
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
is_stage(const places *at, int module)
{
    return tp_stacks_stage(&at->stacks, module) == module;
}

static bool
is_inlet(const places *at, int module)
{
    return at->roles[module] == INLET;
}

static bool
is_island(const places *at, int module)
{
    return at->roles[module] == ISLAND;
}

static bool
is_outlet(const places *at, int module)
{
    if (at->stacks.rows[module] != TP_IS_ROW)
        return false;
    const int role_of = around(at, module);
    return role_of < 0 || at->roles[role_of] == INLET;
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
        if (tp_stacks_stage(&at->stacks, m) >= 0 && wanted(at, m))
            items[out->count++] = m;
    }
    return 0;
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
        if (choose(at, m, is_stage, &stack->stages, err) < 0 ||
            choose(at, m, is_inlet, &stack->inlets, err) < 0 ||
            choose(at, m, is_outlet, &stack->outlets, err) < 0 ||
            choose(at, m, is_island, &stack->islands, err) < 0)
            return -1;
    }
    return 0;
}

static int
make(const places *at, int lists, tp_error *err)
{
    if (lists == 0)
        return refuse(at, 0, "has no list of layers with row layers in it", err);
    if (mark_layers(at, err) < 0)
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
