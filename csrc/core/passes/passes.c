/* SPDX-License-Identifier: Apache-2.0 */
/* passes.c -- how a plan is made: the passes in their order. */
#include "passes/passes.h"

#include <stdlib.h>

#include "passes/choose/choose.h"
#include "passes/choose/defaults.h"
#include "passes/choose/factors.h"
#include "passes/choose/fallback.h"
#include "passes/choose/family_blocks.h"
#include "passes/choose/family_experts.h"
#include "passes/choose/few_heads.h"
#include "passes/choose/large_layers.h"
#include "passes/choose/module_styles.h"
#include "passes/choose/stars.h"
#include "passes/output/entries.h"
#include "passes/output/layers.h"
#include "passes/output/local_integers.h"
#include "passes/output/nothing_sharded.h"
#include "passes/output/output_head.h"
#include "passes/output/regions.h"
#include "passes/output/sequence.h"
#include "passes/output/siblings.h"
#include "passes/output/unmatched.h"
#include "passes/pass.h"
#include "passes/resolve/resolve.h"
#include "passes/settle/copies.h"
#include "passes/settle/experts.h"
#include "passes/settle/norms.h"
#include "passes/settle/per_head.h"
#include "passes/settle/ties.h"
#include "passes/settle/whole_experts.h"
#include "plan/plan_build.h"
#include "plan/plan_hash.h"

enum { MOST_RANKS = 4096 };

/* A build for tests sees to it that passes do what they declare. */
#ifdef TP_CHECK_PASSES
static const bool checked = true;
#else
static const bool checked = false;
#endif

static int
check_options(const tp_plan_options *options, tp_error *err)
{
    if (options->ranks < 1 || options->ranks > MOST_RANKS)
        return tp_fail(err, TP_VALUE,
                       "the TP size is %d, but it must be between 1 and %d",
                       options->ranks, MOST_RANKS);
    if (options->grain < 1)
        return tp_fail(err, TP_VALUE, "tp_grain_size is %lld, but it must be positive",
                       (long long)options->grain);
    if (options->embedding_dim != 0 && options->embedding_dim != 1)
        return tp_fail(
            err, TP_VALUE,
            "embedding_partition_dim is %d, but it must be 0 (vocabulary) or "
            "1 (hidden)",
            options->embedding_dim);
    return 0;
}

static void
link_names(tp_build *build)
{
    const int count = tp_model_parameter_count(build->model);
    for (int i = 0; i < count; i++)
        build->next_name[i] = -1;
    for (int i = count - 1; i >= 0; i--) {
        const int first = tp_build_first(build, i);
        if (first != i) {
            build->next_name[i] = build->next_name[first];
            build->next_name[first] = i;
        }
    }
}

/* Grouped GEMMs take rows of a multiple of 16 bytes, and others are fastest with them.
 * One value for the whole model, because the layers of a block may have several dtypes,
 * and for 16 bits where weights have more, because an engine may cast them afterwards.
 */
static int64_t
aligned_grain(const tp_build *build)
{
    enum { ALIGNMENT = 16 };
    int itemsize = 2;
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const int own = tp_model_parameter(build->model, i)->itemsize;
        itemsize = own < itemsize ? own : itemsize;
    }
    const int64_t grain = build->options->grain, unit = ALIGNMENT / itemsize;
    int64_t common = unit; /* a power of two, as what it has in common with the grain */
    while (grain % common != 0)
        common /= 2;
    int64_t result;
    return __builtin_mul_overflow(grain, unit / common, &result) ? grain : result;
}

static int
open_build(tp_build *build, tp_error *err)
{
    const size_t parameters = (size_t)tp_model_parameter_count(build->model) + 1;
    const size_t rules = (size_t)tp_rules_count(build->rules) + 1;
    const size_t modules = (size_t)tp_model_module_count(build->model) + 1;
    build->choices = calloc(parameters, sizeof(*build->choices));
    build->decisions = calloc(parameters, sizeof(*build->decisions));
    build->next_name = calloc(parameters, sizeof(*build->next_name));
    build->stars = calloc(rules, sizeof(*build->stars));
    build->matched = calloc(rules, sizeof(*build->matched));
    build->module_rules = calloc(modules, sizeof(*build->module_rules));
    build->experts = calloc(modules, sizeof(*build->experts));
    build->stacked = calloc(modules, sizeof(*build->stacked));
    build->attentions = calloc(modules, sizeof(*build->attentions));
    if (build->module_rules == NULL || build->experts == NULL ||
        build->stacked == NULL || build->attentions == NULL || build->choices == NULL ||
        build->decisions == NULL || build->next_name == NULL || build->stars == NULL ||
        build->matched == NULL)
        return tp_fail_memory(err);
    for (size_t i = 0; i < modules; i++) {
        build->attentions[i] = TP_ATTENTION_NEAR;
        build->stacked[i] = -1;
    }
    link_names(build);
    build->aligned = aligned_grain(build);
    if (tp_layout_cache_new(build->plan->arena, build->options->ranks, &build->layouts,
                            err) < 0)
        return -1;
    return tp_geometries_new(build->model, &build->geometries, err);
}

static void
close_build(tp_build *build)
{
    free(build->choices);
    free(build->decisions);
    free(build->next_name);
    free(build->stars);
    free(build->matched);
    free(build->module_rules);
    free(build->experts);
    free(build->stacked);
    free(build->attentions);
    tp_layout_cache_free(build->layouts);
    tp_geometries_free(build->geometries);
}

/* The parts of pass.h, as bits. */
enum {
    CHOICES = 1 << TP_PART_CHOICES,
    STARS = 1 << TP_PART_STARS,
    MATCHED = 1 << TP_PART_MATCHED,
    MODULE_RULES = 1 << TP_PART_MODULE_RULES,
    ATTENTIONS = 1 << TP_PART_ATTENTIONS,
    GEOMETRIES = 1 << TP_PART_GEOMETRIES,
    PAIRED = 1 << TP_PART_PAIRED,
    STACKED = 1 << TP_PART_STACKED,
    DECISIONS = 1 << TP_PART_DECISIONS,
    LAYOUTS = 1 << TP_PART_LAYOUTS,
    EXPERTS = 1 << TP_PART_EXPERTS,
    ENTRIES = 1 << TP_PART_ENTRIES,
    LAYERS = 1 << TP_PART_LAYERS,
    SIBLINGS = 1 << TP_PART_SIBLINGS,
    STACKS = 1 << TP_PART_STACKS,
    REGIONS = 1 << TP_PART_REGIONS,
    INTEGERS = 1 << TP_PART_INTEGERS,
    LOGITS = 1 << TP_PART_LOGITS,
    HASH = 1 << TP_PART_HASH,
    MESSAGES = 1 << TP_PART_MESSAGES,
};

static int
make_hash(tp_build *build, tp_error *err)
{
    (void)err;
    build->plan->hash = tp_plan_hash_make(build->plan);
    return 0;
}

/* A name without a rule follows what another name of its tensor came to, so weights are
 * resolved before ties are settled; biases follow their weights, and copies for an
 * adapter what their originals came to. */
static const tp_pass passes[] = {
    {"stars", tp_stars_read, 0, STARS | MESSAGES},
    {"rules", tp_choose_rules, STARS, CHOICES | MATCHED | MESSAGES},
    {"module styles", tp_module_styles_choose, STARS,
     MODULE_RULES | MATCHED | MESSAGES},
    {"replicated by option", tp_fallback_replicate, CHOICES, CHOICES},
    {"few heads", tp_few_heads_replicate, CHOICES | MODULE_RULES,
     CHOICES | DECISIONS | LAYOUTS | MESSAGES},
    {"family blocks", tp_family_blocks_choose, CHOICES | MODULE_RULES,
     CHOICES | ATTENTIONS | GEOMETRIES | PAIRED | DECISIONS | LAYOUTS | MESSAGES},
    {"family experts", tp_family_experts_choose,
     CHOICES | MODULE_RULES | GEOMETRIES | PAIRED, CHOICES | STACKED | PAIRED},
    {"individual by option", tp_fallback_individual, CHOICES, CHOICES},
    {"defaults", tp_defaults_choose, CHOICES | GEOMETRIES | PAIRED, CHOICES},
    {"large layers", tp_large_layers_choose, CHOICES | MODULE_RULES,
     CHOICES | MESSAGES},
    {"factors of adapters", tp_factors_choose, CHOICES | ATTENTIONS,
     CHOICES | ATTENTIONS},
    {"weights", tp_resolve_weights, CHOICES | MODULE_RULES | ATTENTIONS | GEOMETRIES,
     DECISIONS | LAYOUTS | MESSAGES},
    {"ties", tp_ties_settle, CHOICES | DECISIONS, CHOICES | DECISIONS | MESSAGES},
    {"experts", tp_experts_settle, CHOICES | MODULE_RULES | STACKED | DECISIONS,
     EXPERTS | CHOICES | DECISIONS},
    {"whole experts", tp_whole_experts_settle, EXPERTS | CHOICES | DECISIONS,
     CHOICES | DECISIONS | LAYOUTS},
    {"norms", tp_norms_settle, GEOMETRIES | DECISIONS, DECISIONS},
    {"per head", tp_per_head_settle, CHOICES | GEOMETRIES | DECISIONS,
     CHOICES | DECISIONS | LAYOUTS},
    {"inside sharded blocks", tp_defaults_inside, CHOICES | DECISIONS,
     CHOICES | DECISIONS},
    {"biases", tp_resolve_biases, CHOICES | DECISIONS, CHOICES | DECISIONS},
    {"ties of biases", tp_ties_settle_biases, CHOICES | DECISIONS, CHOICES | DECISIONS},
    {"copies of modules", tp_copies_settle, CHOICES | STACKED | DECISIONS | EXPERTS,
     CHOICES | STACKED | DECISIONS | EXPERTS},
    {"unmatched rules", tp_unmatched_rules, STARS | MATCHED, MESSAGES},
    {"unmatched layers", tp_unmatched_layers, CHOICES, 0},
    {"entries", tp_entries_make, CHOICES | DECISIONS, ENTRIES},
    {"layers", tp_layers_make,
     CHOICES | MODULE_RULES | GEOMETRIES | DECISIONS | EXPERTS, LAYERS | LAYOUTS},
    {"siblings", tp_siblings_make, LAYERS, SIBLINGS},
    {"regions", tp_regions_make, LAYERS, REGIONS},
    {"sequence", tp_sequence_make, ENTRIES | LAYERS | SIBLINGS, ENTRIES | STACKS},
    {"local integers", tp_local_integers_make,
     CHOICES | GEOMETRIES | STACKED | DECISIONS | EXPERTS, INTEGERS},
    {"nothing sharded", tp_nothing_sharded_refuse, ENTRIES | MESSAGES, 0},
    {"output head", tp_output_head_find, ENTRIES | LAYERS, LOGITS},
    {"hash", make_hash,
     ENTRIES | LAYERS | SIBLINGS | REGIONS | STACKS | INTEGERS | LOGITS, HASH},
};

int
tp_plan_new(const tp_model *model, const tp_rules *rules,
            const tp_plan_options *options, tp_plan **out, tp_error *err)
{
    *out = NULL;
    if (check_options(options, err) < 0)
        return -1;
    if (tp_model_module_count(model) == 0)
        return tp_fail(err, TP_VALUE, "the model has no modules, expected at least ''");
    tp_plan *plan = calloc(1, sizeof(*plan));
    if (plan == NULL)
        return tp_fail_memory(err);
    plan->model = model;
    plan->ranks = options->ranks;

    tp_build build = {.model = model, .rules = rules, .options = options, .plan = plan};
    int result = tp_arena_new(&plan->arena, err);
    if (result == 0)
        result = open_build(&build, err);
    if (result == 0)
        result = tp_passes_run(&build, passes, sizeof(passes) / sizeof(passes[0]),
                               checked, err);
    if (result == 0) {
        *out = plan;
        plan = NULL;
    }
    close_build(&build);
    tp_plan_free(plan);
    return result;
}
