/* SPDX-License-Identifier: Apache-2.0 */
/* What users write: specifications, presets, sizes, and the arguments that
 * tp_model_init records. */
#include "config/merge_recorded_args.h"
#include "config/tp_size.h"
#include "cost/rank_memory.h"
#include "cost/traffic.h"
#include "input.h"
#include "model/model.h"
#include "plan/view.h"
#include "rules/preset.h"
#include "rules/rule.h"

static const char *const dtypes[] = {"float32", "bfloat16", "float16"};

/* Also one that is wrong in any place. */
static tp_spec
take_any_spec(input *in)
{
    tp_spec spec = {0};
    spec.partition = (tp_partition)take_int(in, 0, TP_PARTITION_SKIP);
    spec.dim = take_int(in, -1, TP_MAX_DIMS);
    const int flags = take_byte(in);
    spec.gather_output = flags % 8 == 7;
    spec.split_input = flags % 16 == 14;
    spec.sum_gradient = flags % 16 == 13;
    spec.shape.dims = take_int(in, 0, 4);
    if (flags == 255)
        spec.shape.dims = take_int(in, -1, TP_MAX_DIMS + 1);
    for (int i = 0; i < spec.shape.dims && i < TP_MAX_DIMS; i++)
        spec.shape.sizes[i] = take_bool(in) ? -1 : take_size(in);
    if (flags >= 128)
        spec.shape.pieces = take_int(in, -1, 6);
    if (flags == 254)
        spec.shape.pieces = take_int(in, TP_MAX_PIECES - 1, TP_MAX_PIECES + 1);
    for (int i = 0; i < spec.shape.pieces && i < TP_MAX_PIECES; i++)
        spec.shape.piece[i] = take_size(in);
    return spec;
}

/* The pieces of a view are the sharded dimension, and the view is the weight. */
static void
check_view(const tp_view *view, const tp_parameter *weight)
{
    int64_t sum = 0;
    REQUIRE(view->count >= 1 && view->count <= TP_MAX_PIECES);
    for (int i = 0; i < view->count; i++)
        sum += view->piece[i];
    REQUIRE(sum == view->size);
    REQUIRE(view->outer * view->size * view->inner == tp_parameter_elements(weight));
}

/* A specification that is right may still not fit a weight; then there are words. */
static void
try_spec(input *in)
{
    tp_error err = TP_NO_ERROR;
    tp_model *model = NULL;
    tp_view view;
    const tp_spec spec = take_any_spec(in);
    const tp_module module = {.name = "", .kind = TP_MODULE_LINEAR};
    tp_parameter weight = {.name = "weight",
                           .leaf = "weight",
                           .dims = take_int(in, 1, 3),
                           .dtype = "float32",
                           .itemsize = 4,
                           .tied_to = -1};
    int index = 0;
    for (int i = 0; i < weight.dims; i++)
        weight.shape[i] = take_size(in);
    REQUIRE(tp_model_new(&model, &err) == 0);
    REQUIRE(tp_model_add_module(model, &module, &index, &err) == 0);
    if (is_done(tp_model_add_parameter(model, &weight, &index, &err), &err) &&
        is_done(tp_spec_check(&spec, "rule", &err), &err) &&
        spec.partition != TP_PARTITION_SKIP) {
        const int dim = weight.dims > 1 ? spec.partition == TP_PARTITION_ROW : 0;
        if (is_done(tp_view_weight(&spec, &weight, dim, &view, &err), &err))
            check_view(&view, &weight);
    }
    tp_model_free(model);
}

static void
try_names(input *in)
{
    tp_error err = TP_NO_ERROR;
    tp_partition partition;
    tp_collective collective;
    const tp_preset *preset = NULL;
    tp_rules *rules = NULL;
    int states = 0;
    const char *name = take_line(in);
    if (is_done(tp_partition_parse(name, "rule", &partition, &err), &err))
        REQUIRE(tp_text_same(name, tp_partition_name(partition)));
    if (is_done(tp_collective_of(name, &collective, &err), &err))
        REQUIRE(strcmp(name, tp_collective_name(collective)) == 0);
    if (is_done(tp_optimizer_states(name, &states, &err), &err))
        REQUIRE(states >= 0);
    if (is_done(tp_preset_find(name, &preset, &err), &err))
        REQUIRE(tp_text_same(name, preset->name));
    REQUIRE(tp_rules_new(&rules, &err) == 0);
    if (is_done(tp_rules_add_preset(rules, name, &err), &err))
        REQUIRE(preset != NULL && tp_rules_count(rules) == preset->count);
    tp_rules_free(rules);
}

static int64_t
effective(int64_t size)
{
    return size == 0 ? 1 : size;
}

/* The size that is settled on is that of every source that states one. */
static void
try_sizes(input *in)
{
    tp_error err = TP_NO_ERROR;
    tp_size_source sources[4];
    int64_t settled = 0;
    const int count = take_int(in, 0, COUNT(sources));
    for (int i = 0; i < count; i++) {
        sources[i].where = take_line(in);
        sources[i].size = take_size(in);
    }
    const bool differs = tp_size_differs(sources, count);
    REQUIRE(is_done(tp_size_settle(sources, count, &settled, &err), &err) == !differs);
    for (int i = 0; !differs && i < count; i++)
        REQUIRE(sources[i].size < 0 || effective(sources[i].size) == settled);
}

static tp_record
take_record(input *in)
{
    tp_record record;
    record.tp_size = take_size(in);
    record.dtype = dtypes[take_int(in, 0, COUNT(dtypes) - 1)];
    record.group = take_int(in, 0, 2);
    record.group_size = record.group == 0 ? 0 : take_int(in, -1, 4);
    return record;
}

static tp_merge_facts
take_facts(input *in)
{
    const int flags = take_byte(in);
    tp_merge_facts facts = {.section = (flags & 4) != 0 ? "tp" : "tensor_parallel",
                            .bf16 = (flags & 16) != 0,
                            .fp16 = (flags & 32) != 0,
                            .has_mpu = (flags & 64) != 0,
                            .has_mesh = (flags & 128) != 0};
    facts.autotp_size = (flags & 1) != 0 ? take_size(in) : -1;
    facts.tp_size = (flags & 2) != 0 ? take_size(in) : -1;
    facts.tp_group = take_int(in, 0, 2);
    facts.dtype = (flags & 8) != 0 ? take_line(in) : NULL;
    facts.tp_group_size = facts.tp_group == 0 ? 0 : take_int(in, 0, 4);
    return facts;
}

static bool
is_same_size(int64_t a, int64_t b)
{
    return a < 0 || b < 0 || effective(a) == effective(b);
}

/* All sizes that the record and the configuration state are equal. */
static void
check_sizes(const tp_record *record, const tp_merge_facts *facts)
{
    const int64_t sizes[] = {
        facts->autotp_size,
        facts->tp_size,
        facts->tp_group_size > 0 ? facts->tp_group_size : -1,
        record == NULL ? -1 : record->tp_size,
        record == NULL || record->group_size == 0 ? -1 : record->group_size,
    };
    for (int i = 0; i < COUNT(sizes); i++)
        for (int k = 0; k < i; k++)
            REQUIRE(is_same_size(sizes[i], sizes[k]));
}

/* What is filled in was recorded. */
static void
merge(const tp_record *record, const tp_merge_facts *facts)
{
    tp_error err = TP_NO_ERROR;
    tp_merge_fill fill;
    if (!is_done(tp_merge(record, facts, &fill, &err), &err))
        return;
    check_sizes(record, facts);
    if (record == NULL) {
        REQUIRE(fill.autotp_size == -1 && fill.tp_size == -1 && !fill.tp_group);
        return;
    }
    REQUIRE(facts->autotp_size < 0 ? fill.autotp_size == record->tp_size
                                   : fill.autotp_size == -1);
    REQUIRE(!fill.tp_group || record->group != 0);
}

/* Records that are alive at once are equal. */
static void
try_records(input *in)
{
    tp_error err = TP_NO_ERROR;
    tp_records *records = NULL;
    REQUIRE(tp_records_new(&records, &err) == 0);
    for (int steps = 0; in->left > 0 && steps < 40; steps++) {
        const int64_t key = take_int(in, 0, 7);
        int64_t latest = -1;
        const int action = take_int(in, 0, 7);
        if (action == 0) {
            tp_records_remove(records, key);
        } else if (action == 1) {
            tp_records_clear(records);
        } else if (action < 5) {
            const tp_record record = take_record(in);
            if (is_done(tp_records_add(records, key, &record, &err), &err)) {
                REQUIRE(tp_records_latest(records, &latest)->tp_size == record.tp_size);
                REQUIRE(latest == key);
            }
        } else {
            const tp_merge_facts facts = take_facts(in);
            merge(tp_records_find(records, key), &facts);
        }
        REQUIRE((tp_records_latest(records, &latest) != NULL) ==
                (tp_records_count(records) > 0));
    }
    tp_records_free(records);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const tries[])(input *) = {try_spec, try_names, try_sizes,
                                             try_records};
    input in = input_of(data, size);
    tries[take_int(&in, 0, COUNT(tries) - 1)](&in);
    input_end(&in);
    return 0;
}
