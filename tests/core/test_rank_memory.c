/* SPDX-License-Identifier: Apache-2.0 */
#include "cost/rank_memory.h"

#include <stdlib.h>
#include <string.h>

#include "cost/traffic.h"
#include "plan/plan_build.h"
#include "plan_llama.h"

/* Elements of a rank of the llama of plan_llama.h with 1 layer over 2 ranks: see the
 * sizes there; norms stay replicated, the vocabulary of 33 is 17 and 16. */
enum { HIDDEN = 16, NORM = HIDDEN };

static int64_t
elements(const tp_plan *plan, int rank)
{
    int64_t total = 0, shape[TP_MAX_DIMS];
    for (int i = 0; i < tp_plan_entry_count(plan); i++) {
        const tp_parameter *at = tp_model_parameter(plan->model, i);
        if (at->tied_to >= 0)
            continue;
        tp_plan_local_shape(plan, i, rank, shape);
        int64_t size = 1;
        for (int d = 0; d < at->dims; d++)
            size *= shape[d];
        total += size;
    }
    return total;
}

static tp_memory_options
options_of(int stage, int64_t replicas)
{
    return (tp_memory_options){.stage = stage,
                               .replicas = replicas,
                               .states = 2,
                               .reduce_bucket = 10,
                               .persistence = 20,
                               .max_live = 100};
}

static tp_rank_memory
memory_of(fixture *f, int rank, tp_memory_options options)
{
    tp_rank_memory memory;
    CHECK_OK(tp_rank_memory_of(f->plan, rank, &options, &memory, &f->err), &f->err);
    return memory;
}

static void
test_without_zero_everything_is_held_in_float32(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        for (int rank = 0; rank < 2; rank++) {
            const int64_t size = elements(f.plan, rank);
            const tp_rank_memory found = memory_of(&f, rank, options_of(0, 1));
            const int64_t item = found.item;
            CHECK_INT_EQ(found.elements, size);
            CHECK_INT_EQ(found.parameters, size * item);
            CHECK_INT_EQ(found.gradients, size * item);
            CHECK_INT_EQ(found.states, 2 * 4 * size);
            CHECK_INT_EQ(found.master, item == 4 ? 0 : 4 * size);
            CHECK_INT_EQ(found.buckets, 0);
        }
    }
    fixture_free(&f);
}

/* By another way than the one pass of rank_memory.c: every replica, every tensor. */
static int64_t
reaching(const fixture *f, int rank, int64_t partition, int64_t replicas, int64_t total)
{
    int64_t most = 0;
    for (int64_t replica = 0; replica < replicas; replica++) {
        const int64_t low = replica * partition, high = low + partition;
        int64_t from = 0, held = high > total ? high - (low > total ? low : total) : 0;
        for (int i = 0; i < tp_plan_entry_count(f->plan); i++) {
            int64_t shape[TP_MAX_DIMS], size = 1;
            const tp_parameter *at = tp_model_parameter(f->plan->model, i);
            if (at->tied_to >= 0)
                continue;
            tp_plan_local_shape(f->plan, i, rank, shape);
            for (int d = 0; d < at->dims; d++)
                size *= shape[d];
            if (from < high && from + size > low)
                held += size;
            from += size;
        }
        most = held > most ? held : most;
    }
    return most;
}

static void
test_a_partition_is_padded_and_its_gradients_are_full_tensors(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 2, true);
    add_llama_styles(&f);
    const bool made = make_plan(&f);
    for (int64_t replicas = 1; made && replicas < 40; replicas += 3) {
        for (int stage = 1; stage <= 2; stage++) {
            const int64_t size = elements(f.plan, 0);
            const tp_rank_memory found = memory_of(&f, 0, options_of(stage, replicas));
            const int64_t unit = 2 * replicas;
            const int64_t partition = (size + unit - 1) / unit * unit / replicas;
            CHECK_INT_EQ(found.partition, partition);
            CHECK_INT_EQ(found.parameters, partition * replicas * found.item);
            CHECK_INT_EQ(found.master, 4 * partition);
            CHECK_INT_EQ(found.states, 8 * partition);
            CHECK_INT_EQ(found.gradients,
                         found.item * reaching(&f, 0, partition, replicas, size));
            CHECK_INT_EQ(found.buckets, 10 * found.item);
        }
    }
    fixture_free(&f);
}

static void
test_stage_3_pads_each_tensor_and_keeps_small_ones(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        const int64_t replicas = 7;
        int64_t parts = 0, largest = 0;
        for (int i = 0; i < tp_plan_entry_count(f.plan); i++) {
            int64_t shape[TP_MAX_DIMS], size = 1;
            tp_plan_local_shape(f.plan, i, 0, shape);
            for (int d = 0; d < tp_model_parameter(f.plan->model, i)->dims; d++)
                size *= shape[d];
            const int64_t part = (size + replicas - 1) / replicas;
            parts += part;
            largest = part > largest ? part : largest;
        }
        tp_memory_options options = options_of(3, replicas);
        options.sub_group = 1;
        const tp_rank_memory found = memory_of(&f, 0, options);
        CHECK_INT_EQ(found.parameters, parts * found.item);
        CHECK_INT_EQ(found.gradients, parts * found.item);
        CHECK_INT_EQ(found.master, parts * 4);
        /* The norm stays; of the others at most max_live are there. */
        CHECK_INT_EQ(found.gathered, (NORM + 100) * found.item);
        CHECK_INT_EQ(found.kept_buckets, found.buckets);
        CHECK(found.share < 0.5);
        /* A step has float32 gradients and a value more of the largest sub-group. */
        CHECK_INT_EQ(found.step, largest * 8);
        options.sub_group = parts - 1;
        CHECK_INT_EQ(memory_of(&f, 0, options).step, parts * 8);
        options.sub_group = largest + 1;
        const int64_t step = memory_of(&f, 0, options).step;
        CHECK(step > largest * 8 && step < parts * 8);
    }
    fixture_free(&f);
}

static void
test_frozen_parameters_have_neither_gradients_nor_states(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        bool trains[64] = {false};
        tp_memory_options options = options_of(1, 2);
        options.trains = trains;
        tp_rank_memory found = memory_of(&f, 0, options);
        CHECK_INT_EQ(found.trained, 0);
        CHECK_INT_EQ(found.parameters, elements(f.plan, 0) * 4);
        CHECK_INT_EQ(found.gradients + found.states + found.buckets, 0);
        trains[tp_plan_entry_count(f.plan) - 1] = true;
        found = memory_of(&f, 0, options);
        CHECK(found.trained > 0 && found.trained < found.elements);
        CHECK_INT_EQ(found.states, 8 * found.partition);
    }
    fixture_free(&f);
}

static void
test_wrong_sizes_are_said(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        tp_rank_memory memory;
        tp_memory_options options = options_of(4, 1);
        CHECK(tp_rank_memory_of(f.plan, 0, &options, &memory, &f.err) < 0);
        CHECK(strstr(tp_error_text(&f.err), "stage: got 4") != NULL);
        options = options_of(0, 0);
        CHECK(tp_rank_memory_of(f.plan, 0, &options, &memory, &f.err) < 0);
        CHECK(strstr(tp_error_text(&f.err), "replicas: got 0") != NULL);
        options = options_of(0, INT64_MAX);
        CHECK_FAILS(tp_rank_memory_of(f.plan, 0, &options, &memory, &f.err), TP_VALUE,
                    &f.err,
                    "replicas: got 9223372036854775807, expected 1 to 16777216");
        options = options_of(2, 2);
        options.reduce_bucket = INT64_MAX;
        CHECK_FAILS(tp_rank_memory_of(f.plan, 0, &options, &memory, &f.err), TP_VALUE,
                    &f.err, "reduce_bucket_size: got 9223372036854775807");
        options = options_of(0, 1);
        CHECK(tp_rank_memory_of(f.plan, 2, &options, &memory, &f.err) < 0);
        CHECK(strstr(tp_error_text(&f.err), "rank: got 2") != NULL);
        int states = 0;
        CHECK(tp_optimizer_states("adamv", &states, &f.err) < 0);
        CHECK(strstr(tp_error_text(&f.err), "'adamw'") != NULL);
        tp_error_clear(&f.err);
        CHECK_OK(tp_optimizer_states("lion", &states, &f.err), &f.err);
        CHECK_INT_EQ(states, 1);
    }
    fixture_free(&f);
}

static void
test_replicas_are_sent_what_the_stage_needs(void)
{
    const tp_rank_memory memory = {.trained = 100,
                                   .item = 2,
                                   .partition = 26,
                                   .fetched = 50,
                                   .refetched = 50,
                                   .refreshed = 6};
    tp_replica_traffic rows[TP_REPLICA_TRAFFIC];
    tp_memory_options options = options_of(0, 4);
    CHECK_INT_EQ(tp_replica_traffic_of(&options, &memory, rows), 1);
    CHECK_INT_EQ(rows[0].bytes, 200);
    options.stage = 2;
    CHECK_INT_EQ(tp_replica_traffic_of(&options, &memory, rows), 2);
    CHECK_INT_EQ(rows[1].bytes, 52);
    options.stage = 3;
    CHECK_INT_EQ(tp_replica_traffic_of(&options, &memory, rows), 4);
    CHECK_INT_EQ(rows[2].bytes, 6);
    CHECK_INT_EQ(rows[3].bytes, 26 * 2 * 4);
    options.replicas = 1;
    CHECK_INT_EQ(tp_replica_traffic_of(&options, &memory, rows), 0);
}

static void
test_a_ring_sends_an_all_reduce_twice(void)
{
    CHECK(tp_collective_seconds(TP_ALL_REDUCE, 1000, 4, 100) == 15.0);
    CHECK(tp_collective_seconds(TP_REDUCE_SCATTER, 1000, 4, 100) == 7.5);
    CHECK(tp_collective_seconds(TP_ALL_GATHER, 250, 4, 100) == 7.5);
    CHECK(tp_collective_seconds(TP_BROADCAST, 250, 1, 100) == 0);
    CHECK(tp_collective_seconds(TP_BROADCAST, 250, 4, 100) == 2.5);
    tp_error err = TP_NO_ERROR;
    tp_collective kind = TP_ALL_REDUCE;
    CHECK_OK(tp_collective_of("all-gather", &kind, &err), &err);
    CHECK_INT_EQ(kind, TP_ALL_GATHER);
    CHECK(tp_collective_of("gather", &kind, &err) < 0);
    tp_error_clear(&err);
}

static void
test_negative_ranks_stages_and_buckets_are_refused(void)
{
    fixture f = fixture_new(2);
    tp_rank_memory memory;
    add_llama(&f, 1, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        tp_memory_options options = options_of(1, 2);
        CHECK_FAILS(tp_rank_memory_of(f.plan, -1, &options, &memory, &f.err), TP_VALUE,
                    &f.err, "rank: got -1, expected 0 to 1");
        options.stage = -1;
        CHECK_FAILS(tp_rank_memory_of(f.plan, 0, &options, &memory, &f.err), TP_VALUE,
                    &f.err, "stage: got -1, expected 0 to 3");
        options = options_of(1, 2);
        options.reduce_bucket = -1;
        CHECK_FAILS(tp_rank_memory_of(f.plan, 0, &options, &memory, &f.err), TP_VALUE,
                    &f.err, "reduce_bucket_size: got -1");
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_without_zero_everything_is_held_in_float32);
    RUN(test_a_partition_is_padded_and_its_gradients_are_full_tensors);
    RUN(test_stage_3_pads_each_tensor_and_keeps_small_ones);
    RUN(test_frozen_parameters_have_neither_gradients_nor_states);
    RUN(test_wrong_sizes_are_said);
    RUN(test_replicas_are_sent_what_the_stage_needs);
    RUN(test_a_ring_sends_an_all_reduce_twice);
    RUN(test_negative_ranks_stages_and_buckets_are_refused);
    return check_result();
}
