/* SPDX-License-Identifier: Apache-2.0 */
/* test_plan_random [SEED [ROUNDS]]: other plans than the usual ones, and more. */
#include "plan_checks.h"

static uint32_t state = 4711;
static int rounds = 4000;
/* Allocations fail in one round of these, which makes a plan some hundred times. */
enum { FAILING = 8 };

static int
pick(int low, int high)
{
    state = state * 1664525u + 1013904223u;
    return low + (int)((state >> 8) % (uint32_t)(high - low + 1));
}

static int
try_plan_of(int round, fixture *f)
{
    return round % FAILING == 0 ? try_plan(f) : try_plan_once(f);
}

/* Mostly sensible, now and then not. */
static tp_spec
random_spec(void)
{
    tp_spec spec = {
        .partition = (tp_partition)pick(TP_PARTITION_COLUMN, TP_PARTITION_SKIP),
        .dim = -1};
    if (spec.partition == TP_PARTITION_SKIP)
        return spec;
    spec.gather_output = spec.partition == TP_PARTITION_COLUMN && pick(0, 3) == 0;
    spec.split_input = spec.partition == TP_PARTITION_ROW && pick(0, 3) == 0;
    spec.dim = pick(0, 3) == 0 ? pick(0, 1) : -1;
    if (pick(0, 2) > 0)
        return spec;
    spec.shape.dims = pick(1, 4);
    if (spec.dim < 0)
        spec.dim = pick(0, spec.shape.dims - 1);
    for (int i = 0; i < spec.shape.dims; i++)
        spec.shape.sizes[i] = pick(0, 1) == 0 ? -1 : pick(1, 8);
    if (spec.dim < spec.shape.dims && pick(0, 2) == 0) {
        spec.shape.sizes[spec.dim] = 0;
        spec.shape.pieces = pick(1, 3);
        for (int i = 0; i < spec.shape.pieces; i++)
            spec.shape.piece[i] = 4 * pick(1, 4);
    }
    return spec;
}

/* Modules and rules drawn at random; two names may share a tensor. */
static void
add_random(fixture *f)
{
    char name[32];
    add_module(f, "", TP_MODULE_OTHER, 0);
    f->facts.model_type = pick(0, 1) == 0 ? "bloom" : "llama";
    const int key = pick(1, 3);
    add_module(f, "attn", TP_MODULE_OTHER, 3, "num_heads", key * pick(1, 3),
               "num_key_value_heads", key, "head_dim", 4);
    const int count = pick(1, 6);
    int tie = -1;
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof(name), pick(0, 1) == 0 ? "attn.query_key_value%d" : "w%d",
                 i);
        const tp_module_kind kind = (tp_module_kind)pick(0, 3);
        const int module = add_module(f, name, kind, 0);
        const int64_t shape[] = {4 * pick(1, 9), 4 * pick(1, 9)};
        if (tie >= 0 && pick(0, 2) == 0) {
            const tp_parameter *first = tp_model_parameter(f->model, tie);
            add_shaped(f, module, "weight", 2, first->shape, tie);
            continue;
        }
        const int weight = add_shaped(f, module, "weight", 2, shape, -1);
        tie = pick(0, 2) == 0 ? weight : tie;
        if (pick(0, 2) == 0)
            add_vector(f, weight, "bias", (int)shape[pick(0, 3) == 0]);
    }
    f->facts.input_embedding = pick(-1, count);
    f->facts.output_head = pick(-1, count);
    for (int i = pick(1, 4); i > 0; i--) {
        const tp_spec spec = random_spec();
        if (tp_spec_check(&spec, "r", &f->err) == 0)
            add_spec(f, "r", pick(0, 1) == 0 ? ".*[0-3]" : "attn.*", spec);
        tp_error_clear(&f->err);
    }
}

static void
test_a_random_plan_covers_every_weight_or_is_refused_with_words(void)
{
    int made = 0;
    for (int round = 0; round < rounds; round++) {
        fixture f = fixture_new(pick(1, 5));
        f.options.grain = pick(1, 5);
        f.options.embedding_dim = pick(0, 1);
        add_random(&f);
        if (try_plan_of(round, &f) < 0) {
            CHECK(f.err.code == TP_VALUE && strlen(tp_error_text(&f.err)) > 20);
        } else {
            made++;
            check_plan(&f);
        }
        fixture_free(&f);
    }
    /* Both ways are tried often enough to mean something. */
    CHECK(made > rounds / 8 && made < rounds - rounds / 8);
}

static void
test_tied_names_have_equal_entries(void)
{
    for (int round = 0; round < rounds / 4; round++) {
        fixture f = fixture_new(pick(1, 3));
        add_random(&f);
        const int count = try_plan_of(round, &f) == 0 ? tp_plan_entry_count(f.plan) : 0;
        for (int i = 0; i < count; i++) {
            const int first = tp_model_parameter(f.model, i)->tied_to;
            if (first < 0)
                continue;
            const tp_entry *a = tp_plan_entry(f.plan, i);
            const tp_entry *b = tp_plan_entry(f.plan, first);
            CHECK(a->kind == b->kind && a->dim == b->dim && a->layout == b->layout);
        }
        fixture_free(&f);
    }
}

int
main(int argc, char **argv)
{
    if (argc > 1)
        state = (uint32_t)strtoul(argv[1], NULL, 10);
    if (argc > 2)
        rounds = (int)strtol(argv[2], NULL, 10);
    RUN(test_a_random_plan_covers_every_weight_or_is_refused_with_words);
    RUN(test_tied_names_have_equal_entries);
    return check_result();
}
