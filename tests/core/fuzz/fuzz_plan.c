/* SPDX-License-Identifier: Apache-2.0 */
/* Plans of models, rules and options of any kind, and all that is read of one. */
#include "cost/rank_memory.h"
#include "cost/traffic.h"
#include "model/names.h"
#include "model_input.h"
#include "plan/blocks.h"
#include "plan/chunks.h"
#include "plan/plan_form.h"
#include "plan/rank_share.h"
#include "plan/samples.h"
#include "plan_checks.h"
#include "rules/preset.h"

enum { MOST_RANKS = 6 };

/* Names of modules with `*` for indices, or a part of one. */
static const char *
take_pattern(const fixture *f, input *in, char *room)
{
    const int module = take_byte(in) % tp_model_module_count(f->model);
    tp_names_pattern(tp_model_module(f->model, module)->name, room);
    const char *at = room;
    for (int skip = take_int(in, 0, 3); skip > 0 && strchr(at, '.') != NULL; skip--)
        at = strchr(at, '.') + 1;
    return at;
}

/* One that is mostly right, so that there is a plan. */
static tp_spec
take_likely_spec(input *in)
{
    tp_spec spec = {0};
    spec.partition = (tp_partition)take_int(in, 0, TP_PARTITION_SKIP);
    spec.dim = take_int(in, -1, 2);
    const int flags = take_byte(in);
    spec.gather_output = flags % 8 == 7 && spec.partition == TP_PARTITION_COLUMN;
    spec.split_input = flags % 8 == 6 && spec.partition == TP_PARTITION_ROW;
    spec.sum_gradient = flags % 8 == 5 && spec.partition == TP_PARTITION_SKIP;
    if (flags < 128 || spec.partition == TP_PARTITION_SKIP)
        return spec;
    spec.shape.dims = take_int(in, 1, 4);
    for (int i = 0; i < spec.shape.dims; i++)
        spec.shape.sizes[i] = take_bool(in) ? -1 : take_features(in);
    spec.shape.pieces = take_int(in, 0, 3);
    for (int i = 0; i < spec.shape.pieces; i++)
        spec.shape.piece[i] = take_features(in);
    return spec;
}

static void
add_config_rule(fixture *f, const char *pattern, const tp_spec *spec)
{
    char text[LONGEST_PART + 8];
    tp_rule rule = {.source = TP_FROM_CONFIG, .spec = *spec, .pattern_count = 1};
    if (!is_done(tp_spec_check(spec, "rule", &f->err), &f->err))
        return;
    snprintf(text, sizeof(text), ".*%s", pattern[0] == '*' ? "\\d+" : pattern);
    rule.label = fixture_copy(text);
    rule.patterns = calloc(1, sizeof(*rule.patterns));
    REQUIRE(rule.patterns != NULL);
    if (tp_regex_new(text, NULL, &rule.patterns[0], &f->err) < 0) {
        tp_error_clear(&f->err);
        tp_rule_clear(&rule);
        return;
    }
    is_done(tp_rules_add(f->rules, &rule, &f->err), &f->err);
}

static int
style_count(void)
{
    int count = 0;
    while (tp_hf_plan_style_name(count) != NULL)
        count++;
    return count;
}

static void
take_rules(fixture *f, input *in)
{
    int presets = 0;
    const char *const *names = tp_preset_names(&presets);
    const int styles = style_count();
    char room[LONGEST_PART];
    for (int left = take_int(in, 0, 6); left > 0; left--) {
        const int kind = take_int(in, 0, 7);
        const char *pattern = take_pattern(f, in, room);
        if (kind == 0) {
            const int preset = take_byte(in) % presets;
            is_done(tp_rules_add_preset(f->rules, names[preset], &f->err), &f->err);
        } else if (kind < 4) {
            const tp_spec spec = take_likely_spec(in);
            add_config_rule(f, pattern, &spec);
        } else {
            const char *style = tp_hf_plan_style_name(take_byte(in) % styles);
            const bool required = take_int(in, 0, 7) == 7;
            is_done(tp_rules_add_style(f->rules, pattern, style, required, &f->err),
                    &f->err);
        }
    }
}

/* One pattern, where the input says so; `room` holds it. */
static int
take_patterns(const fixture *f, input *in, char *room, const char **out)
{
    if (take_int(in, 0, 7) < 7)
        return 0;
    *out = take_pattern(f, in, room);
    return 1;
}

typedef struct {
    char rooms[4][LONGEST_PART];
    const char *names[4];
} patterns;

static void
take_options(fixture *f, input *in, patterns *kept)
{
    tp_plan_options *options = &f->options;
    const int flags = take_byte(in), more = take_byte(in);
    options->ranks = more == 255 ? take_int(in, -1, 1) : take_int(in, 1, MOST_RANKS);
    options->grain = take_int(in, 0, 7) < 6 ? 1 : take_size(in);
    options->strict = flags % 16 == 15;
    options->defaults = (flags & 16) == 0;
    options->families = (flags & 32) == 0;
    options->heuristics = (flags & 64) == 0;
    options->large_layers = (flags & 128) == 0;
    options->embedding_dim = more & 1;
    options->sequence = more % 8 == 7;
    options->must_shard = more % 16 == 13;
    options->expert_partition = (tp_expert_partition)(more / 16 % 3);
    options->vocab_parallel_lm_head = more / 64 % 3 - 1;
    options->replicated = &kept->names[0];
    options->replicated_count = take_patterns(f, in, kept->rooms[0], &kept->names[0]);
    options->individual = &kept->names[1];
    options->individual_count = take_patterns(f, in, kept->rooms[1], &kept->names[1]);
    options->all_tokens = &kept->names[2];
    options->all_tokens_count =
        options->sequence ? take_patterns(f, in, kept->rooms[2], &kept->names[2]) : 0;
    options->large_name_count = take_patterns(f, in, kept->rooms[3], &kept->names[3]);
    if (options->large_name_count > 0)
        options->large_names = &kept->names[3];
}

/* The chunks of a shard are the shard, and in the parameter. */
static void
read_chunks(fixture *f, int index, int rank)
{
    const tp_entry *entry = tp_plan_entry(f->plan, index);
    const tp_parameter *at = tp_model_parameter(f->model, index);
    int64_t shape[TP_MAX_DIMS], sum = 0;
    tp_chunk *chunks = NULL;
    int count = 0;
    tp_plan_local_shape(f->plan, index, rank, shape);
    const int64_t end = entry->dim < 0 ? 1 : shape[entry->dim];
    const int result =
        tp_chunks(f->plan, index, rank, 0, end, &chunks, &count, &f->err);
    if (!is_done(result, &f->err)) {
        REQUIRE(entry->layout == NULL);
        return;
    }
    for (int i = 0; i < count; i++) {
        REQUIRE(chunks[i].from == sum && chunks[i].length > 0);
        REQUIRE(chunks[i].at >= 0 &&
                chunks[i].at <= at->shape[entry->dim] - chunks[i].length);
        sum += chunks[i].length;
    }
    REQUIRE(sum == end);
    free(chunks);
}

/* Runs of blocks are in the parameter, and hold as much as the shard. */
static void
read_blocks(fixture *f, int index, int rank, int64_t block)
{
    const tp_entry *entry = tp_plan_entry(f->plan, index);
    tp_blocks blocks = {0};
    const int result = tp_blocks_of(f->plan, index, rank, block, &blocks, &f->err);
    if (!is_done(result, &f->err))
        return;
    int64_t sum = 0;
    for (int i = 0; i < blocks.count; i++) {
        REQUIRE(blocks.runs[i].start >= 0 && blocks.runs[i].length > 0);
        REQUIRE(blocks.runs[i].start <= blocks.size - blocks.runs[i].length);
        sum += blocks.runs[i].length;
    }
    REQUIRE(blocks.outer * sum * block ==
            entry->outer * entry->layout->shards[rank].width * entry->inner);
    free(blocks.runs);
}

static void
read_table(fixture *f)
{
    tp_plan_table *table = NULL;
    REQUIRE(tp_plan_table_new(f->plan, &table, &f->err) == 0);
    int count = 0;
    for (int i = 0; i < tp_plan_table_count(table); i++) {
        count += tp_plan_table_row(table, i)->count;
        for (int rank = 0; rank < tp_plan_ranks(f->plan); rank++)
            REQUIRE(tp_plan_table_bytes(table, i, rank) <=
                    tp_plan_table_row(table, i)->full_bytes);
    }
    REQUIRE(count == tp_plan_entry_count(f->plan));
    tp_plan_table_free(table);
}

static void
read_costs(fixture *f, input *in)
{
    tp_memory_options options = {.reduce_bucket = TP_REDUCE_BUCKET,
                                 .persistence = TP_PERSISTENCE_THRESHOLD,
                                 .max_live = TP_MAX_LIVE_PARAMETERS,
                                 .sub_group = TP_SUB_GROUP};
    options.stage = take_int(in, 0, 4);
    options.replicas = take_int(in, 0, 8);
    options.states = take_int(in, 0, 2);
    options.overlap_comm = take_bool(in);
    tp_replica_traffic rows[TP_REPLICA_TRAFFIC];
    tp_rank_memory memory;
    if (take_bool(in))
        options.persistence = options.sub_group = 64;
    if (is_done(tp_rank_memory_of(f->plan, 0, &options, &memory, &f->err), &f->err))
        REQUIRE(tp_replica_traffic_of(&options, &memory, rows) <= TP_REPLICA_TRAFFIC);
}

/* A plan has the form of itself. */
static void
read_form(fixture *f)
{
    tp_text text = TP_NO_TEXT;
    REQUIRE(tp_plan_form_difference(f->plan, f->plan, &text, &f->err) == 0);
    REQUIRE(text.size == 0);
    REQUIRE(tp_plan_warn_replicated(f->plan, &text, &f->err) == 0);
    tp_text_free(&text);
    int *samples = calloc((size_t)tp_plan_entry_count(f->plan) + 1, sizeof(*samples));
    int count = 0;
    REQUIRE(samples != NULL);
    REQUIRE(tp_plan_samples(f->plan, samples, &count, &f->err) == 0);
    for (int i = 1; i < count; i++)
        REQUIRE(samples[i - 1] < samples[i]);
    free(samples);
}

static void
read_plan(fixture *f, input *in)
{
    check_plan(f);
    REQUIRE(check_failures == 0);
    const int64_t block = take_int(in, 1, 16);
    int64_t most = 0;
    for (int rank = 0; rank < tp_plan_ranks(f->plan); rank++) {
        for (int i = 0; i < tp_plan_entry_count(f->plan); i++) {
            read_chunks(f, i, rank);
            read_blocks(f, i, rank, block);
            tp_plan_is_counted(f->plan, i, rank);
        }
        const int64_t own = tp_plan_rank_parameters(f->plan, rank);
        most = own > most ? own : most;
    }
    REQUIRE(most <= tp_plan_parameters(f->plan));
    read_table(f);
    read_form(f);
    read_costs(f, in);
}

/* The same arguments make the same plan. */
static void
make_again(fixture *f)
{
    tp_plan *other = NULL;
    REQUIRE(tp_plan_new(f->model, f->rules, &f->options, &other, &f->err) == 0);
    REQUIRE(tp_plan_hash(other) == tp_plan_hash(f->plan));
    REQUIRE(tp_plan_layout_hash(other) == tp_plan_layout_hash(f->plan));
    tp_plan_free(other);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = input_of(data, size);
    patterns kept;
    fixture f = fixture_new(1);
    take_model(&f, &in);
    take_rules(&f, &in);
    take_options(&f, &in, &kept);
    f.facts.integers = f.integers;
    if (is_done(tp_model_seal(f.model, &f.facts, &f.err), &f.err) &&
        is_done(tp_plan_new(f.model, f.rules, &f.options, &f.plan, &f.err), &f.err)) {
        read_plan(&f, &in);
        make_again(&f);
    }
    fixture_free(&f);
    input_end(&in);
    return 0;
}
