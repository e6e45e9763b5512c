/* SPDX-License-Identifier: Apache-2.0 */
/* The core keeps no state of its own: threads share a model and rules, and each has its
 * own plans, records and errors. */
#include "base/dtype.h"
#include "config/merge_recorded_args.h"
#include "plan_llama.h"
#include "threads.h"

enum { THREADS = 4, ROUNDS = 12, MOST_RANKS = 4 };

typedef struct {
    fixture f;
    uint64_t hashes[MOST_RANKS]; /* of the plans for 1, 2, ... ranks */
} shared_plans;

/* 0: the plan is the one that was made before there were threads. */
static int
make_one(const shared_plans *shared, int ranks)
{
    tp_error err = TP_NO_ERROR;
    tp_plan *plan = NULL;
    tp_plan_table *table = NULL;
    tp_plan_options options = shared->f.options;
    options.ranks = ranks;
    int wrong = 1;
    if (tp_plan_new(shared->f.model, shared->f.rules, &options, &plan, &err) < 0)
        goto done;
    wrong = 2;
    if (tp_plan_hash(plan) != shared->hashes[ranks - 1])
        goto done;
    wrong = 3;
    if (tp_plan_table_new(plan, &table, &err) < 0 || tp_plan_table_count(table) == 0)
        goto done;
    wrong = 0;
done:
    tp_plan_table_free(table);
    tp_plan_free(plan);
    tp_error_clear(&err);
    return wrong;
}

static int
make_plans(void *shared, int thread)
{
    int wrong = 0;
    for (int round = 0; wrong == 0 && round < ROUNDS; round++)
        wrong = make_one(shared, (round + thread) % MOST_RANKS + 1);
    return wrong;
}

static void
test_threads_make_plans_of_one_model_by_the_same_rules(void)
{
    shared_plans shared = {.f = fixture_new(1)};
    fixture *f = &shared.f;
    add_llama(f, 3, true);
    add_llama_styles(f);
    add_preset(f, "llama");
    add_rule(f, "any", "(.*\\.)?mlp\\.(up|gate)_proj\\.weight$", TP_PARTITION_COLUMN);
    f->facts.integers = f->integers;
    CHECK_OK(tp_model_seal(f->model, &f->facts, &f->err), &f->err);
    for (int ranks = 1; ranks <= MOST_RANKS; ranks++) {
        tp_plan *plan = NULL;
        f->options.ranks = ranks;
        CHECK_OK(tp_plan_new(f->model, f->rules, &f->options, &plan, &f->err), &f->err);
        shared.hashes[ranks - 1] = tp_plan_hash(plan);
        tp_plan_free(plan);
    }
    CHECK_INT_EQ(run_threads(THREADS, make_plans, &shared), 0);
    fixture_free(f);
}

static int
record(void *shared, int thread)
{
    tp_error err = TP_NO_ERROR;
    tp_records *records = NULL;
    const char *dtype = NULL;
    int wrong = 1;
    (void)shared;
    if (tp_records_new(&records, &err) < 0 ||
        tp_dtype_name(thread % 2 == 0 ? "bf16" : "half", "dtype", &dtype, &err) < 0)
        goto done;
    for (int key = 0; key < 100; key++) {
        const tp_record own = {thread + 1, dtype, 0, 0};
        const tp_record other = {thread + 2, dtype, 0, 0};
        const tp_merge_facts facts = {
            .autotp_size = -1, .tp_size = -1, .section = "tp", .dtype = dtype};
        tp_merge_fill fill;
        wrong = 2;
        if (tp_records_add(records, key, &own, &err) < 0 ||
            tp_records_add(records, key + 1, &other, &err) == 0)
            goto done;
        tp_error_clear(&err);
        wrong = 3;
        if (tp_merge(tp_records_find(records, key), &facts, &fill, &err) < 0 ||
            fill.tp_size != thread + 1)
            goto done;
    }
    wrong = 0;
done:
    tp_error_clear(&err);
    tp_records_free(records);
    return wrong;
}

static void
test_threads_have_records_of_their_own(void)
{
    CHECK_INT_EQ(run_threads(THREADS, record, NULL), 0);
}

int
main(void)
{
    RUN(test_threads_make_plans_of_one_model_by_the_same_rules);
    RUN(test_threads_have_records_of_their_own);
    return check_result();
}
