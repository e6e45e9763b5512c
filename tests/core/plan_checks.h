/* SPDX-License-Identifier: Apache-2.0 */
/* plan_checks.h -- what holds for every plan, however it was asked for. */
#ifndef TP_PLAN_CHECKS_H
#define TP_PLAN_CHECKS_H

#include "plan_fixture.h"

/* The view covers the parameter, the shards of its ranks too. */
static inline void
check_entry(const fixture *f, int index)
{
    const tp_entry *entry = tp_plan_entry(f->plan, index);
    const tp_parameter *at = tp_model_parameter(f->model, index);
    int64_t full = 1;
    for (int i = 0; i < at->dims; i++)
        full *= at->shape[i];
    if (entry->layout == NULL) {
        CHECK(entry->dim == -1 && entry->kind <= TP_SKIPPED);
        return;
    }
    CHECK(entry->kind > TP_SKIPPED);
    CHECK_INT_EQ(entry->outer * entry->layout->size * entry->inner, full);
    CHECK_INT_EQ(at->shape[entry->dim] % entry->layout->size, 0);
    int64_t own = 0;
    for (int rank = 0; rank < tp_plan_ranks(f->plan); rank++) {
        int64_t shape[TP_MAX_DIMS];
        int64_t shard = 1;
        tp_plan_local_shape(f->plan, index, rank, shape);
        for (int i = 0; i < at->dims; i++)
            shard *= shape[i];
        const tp_shard *held = &entry->layout->shards[rank];
        CHECK_INT_EQ(shard, entry->outer * held->width * entry->inner);
        for (int i = 0; i < held->count; i++) {
            if (held->runs[i].owner == rank)
                own += held->runs[i].length;
        }
    }
    CHECK_INT_EQ(own, entry->layout->size);
}

static inline void
check_layer(const fixture *f, int index)
{
    const tp_layer *layer = tp_plan_layer(f->plan, index);
    CHECK((layer->kind == TP_HEADS) == (layer->heads != NULL));
    if (layer->weight < 0) {
        CHECK(
            layer->kind == TP_EXPERTS || layer->kind == TP_SHARE ||
            (layer->kind == TP_HEADS && layer->heads->ranks == tp_plan_ranks(f->plan)));
        return;
    }
    const tp_entry *weight = tp_plan_entry(f->plan, layer->weight);
    if (layer->kind == TP_ROPE) {
        const int64_t features = tp_model_parameter(f->model, layer->weight)->shape[0];
        CHECK(layer->run_start >= 0 && layer->run_length > 0);
        CHECK_INT_EQ(layer->run_start + layer->run_length, features);
        return;
    }
    CHECK(weight->layout != NULL);
    if (layer->bias < 0)
        return;
    const tp_entry *bias = tp_plan_entry(f->plan, layer->bias);
    CHECK(bias->layout == (layer->kind == TP_COLUMN ? weight->layout : NULL));
}

static inline void
check_plan(const fixture *f)
{
    for (int i = 0; i < tp_plan_entry_count(f->plan); i++)
        check_entry(f, i);
    for (int i = 0; i < tp_plan_layer_count(f->plan); i++)
        check_layer(f, i);
}

#endif
