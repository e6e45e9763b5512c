/* SPDX-License-Identifier: Apache-2.0 */
/* whole_experts.c -- modules of experts of which each rank has some, each whole. */
#include "passes/settle/whole_experts.h"

#define WHERE "tensor_parallel.expert_partition: got 'experts', but "

/* "auto" takes whole experts where shards of each would be thin, and a rank has enough
 * experts. Matrix products on GPUs work in tiles of 64 to 256 features, so that a
 * thinner shard leaves some of a tile empty. Of n experts on a rank one with twice the
 * mean number of tokens gives the rank 1/n more to do than the others. */
enum { THIN = 128, ENOUGH = 4 };

const char *const tp_whole_experts_keys[] = {"num_experts", NULL};

static const char rule[] = "expert_partition: experts";
static const tp_spec along_experts = {.partition = TP_PARTITION_COLUMN, .dim = 0};

/* The number of experts, or -1 where the module does not say it. */
static int64_t
experts_of(const tp_module *module)
{
    return tp_model_integer(module->integers, module->integer_count,
                            tp_whole_experts_keys);
}

static bool
runs_experts(const tp_module *module)
{
    return (module->kind == TP_MODULE_EXPERTS ||
            module->kind == TP_MODULE_EXPERT_BLOCKS) &&
           experts_of(module) >= 1;
}

/* Why a parameter of the module, or of one inside of it, cannot be sharded along the
 * experts; NULL where it can. */
static const char *
obstacle(const tp_build *build, int module, int index, int64_t experts)
{
    const tp_parameter *at = tp_model_parameter(build->model, index);
    if (at->module != module)
        return "is in a module inside of the experts, and each rank would have a part "
               "of its gradient";
    if (tp_build_first(build, index) != index || build->next_name[index] >= 0)
        return "is tied to another parameter";
    if (build->choices[index].source == TP_FROM_CONFIG)
        return "has a rule of partition_config, too";
    if (at->dims < 2 || at->shape[0] != experts)
        return "has no dimension of experts in front";
    return NULL;
}

/* Add to `why` what stands against whole experts in the module, if anything. */
static void
add_obstacle(const tp_build *build, int module, tp_text *why)
{
    const tp_module *at = tp_model_module(build->model, module);
    const int64_t experts = experts_of(at);
    if (!runs_experts(at)) {
        tp_text_add(why,
                    "'%s' (%s) is not known to be given tokens, indices of experts and "
                    "weights, as most experts of transformers are",
                    at->name, at->class_name);
        return;
    }
    if (experts < build->options->ranks) {
        tp_text_add(why, "'%s' has %lld expert%s for %d ranks", at->name,
                    (long long)experts, experts == 1 ? "" : "s", build->options->ranks);
        return;
    }
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        const tp_parameter *own = tp_model_parameter(build->model, i);
        const char *found = tp_model_is_inside(build->model, own->module, module)
                                ? obstacle(build, module, i, experts)
                                : NULL;
        if (found == NULL)
            continue;
        tp_text_add(why, "'%s' %s", own->name, found);
        return;
    }
}

static int64_t
widest(const tp_layout *layout)
{
    int64_t most = 0;
    for (int rank = 0; rank < layout->ranks; rank++) {
        const int64_t width = layout->shards[rank].width;
        most = width > most ? width : most;
    }
    return most;
}

/* Features of an expert in the largest shard. A weight that holds gate and up beside
 * each other has twice as many, so that the weight with fewest says it. */
static int64_t
shard_width(const tp_build *build, int module)
{
    int64_t least = INT64_MAX;
    for (int i = tp_model_first_parameter(build->model, module); i >= 0;
         i = tp_model_next_parameter(build->model, i)) {
        const tp_layout *layout = build->decisions[i].layout;
        const int64_t width = layout == NULL ? INT64_MAX : widest(layout);
        least = width < least ? width : least;
    }
    return least;
}

/* Add to `why` what makes a shard of every expert the better choice, if anything. */
static void
add_preference(const tp_build *build, int module, tp_text *why)
{
    const tp_module *at = tp_model_module(build->model, module);
    const int64_t experts = experts_of(at), ranks = build->options->ranks;
    const int64_t width = shard_width(build, module);
    if (experts % ranks != 0)
        tp_text_add(why, "the %lld experts of '%s' do not divide by %d ranks",
                    (long long)experts, at->name, (int)ranks);
    else if (experts / ranks < ENOUGH)
        tp_text_add(why, "each rank has %lld of the experts of '%s', fewer than %d",
                    (long long)(experts / ranks), at->name, ENOUGH);
    else if (width >= THIN)
        tp_text_add(why,
                    "a rank's shard of an expert of '%s' has %lld features, not "
                    "fewer than %d",
                    at->name, (long long)width, THIN);
}

typedef void add_reason(const tp_build *build, int module, tp_text *why);

/* Let `add` write about the modules of experts, up to the first with something to say.
 * Returns how many there are up to there. */
static int
ask(const tp_build *build, add_reason *add, tp_text *why)
{
    int count = 0;
    for (int i = 0; i < tp_model_module_count(build->model) && why->size == 0; i++) {
        if (!build->experts[i])
            continue;
        count++;
        add(build, i, why);
    }
    return count;
}

static void
decide(tp_build *build, int index, const tp_layout *layout, const char *label)
{
    const tp_parameter *at = tp_model_parameter(build->model, index);
    tp_decision *out = &build->decisions[index];
    build->choices[index] = (tp_choice){&along_experts, build->choices[index].source,
                                        label, TP_REASON_RULE};
    *out = (tp_decision)TP_NO_DECISION;
    out->kind = TP_COLUMN;
    out->dim = 0;
    out->layout = layout;
    for (int i = 1; i < at->dims; i++)
        out->inner *= at->shape[i];
}

static int
shard(tp_build *build, const char *label, tp_error *err)
{
    for (int i = 0; i < tp_model_module_count(build->model); i++) {
        if (!build->experts[i])
            continue;
        const int64_t experts = experts_of(tp_model_module(build->model, i));
        const tp_piece piece = {experts, 1, TP_PIECE_UNITS};
        const tp_layout *layout = NULL;
        if (tp_layout_cache_get(build->layouts, &piece, 1, (tp_heads){0, 0}, &layout,
                                err) < 0)
            return -1;
        for (int j = tp_model_first_parameter(build->model, i); j >= 0;
             j = tp_model_next_parameter(build->model, j))
            decide(build, j, layout, label);
    }
    return 0;
}

static bool
in_experts(const tp_build *build, int module)
{
    while (module >= 0 && !build->experts[module])
        module = tp_model_module(build->model, module)->parent;
    return module >= 0;
}

/* Say in the rule of every sharded parameter of experts why it is sharded in width. */
static int
keep_width(tp_build *build, const char *why, tp_error *err)
{
    for (int i = 0; i < tp_model_parameter_count(build->model); i++) {
        tp_choice *choice = &build->choices[i];
        if (build->decisions[i].layout == NULL ||
            !in_experts(build, tp_model_parameter(build->model, i)->module))
            continue;
        tp_text label = TP_NO_TEXT;
        tp_text_add(&label, "%s; width by auto, since %s", choice->rule, why);
        choice->rule = tp_build_text(build, &label, err);
        if (choice->rule == NULL)
            return -1;
    }
    return 0;
}

static int
choose(tp_build *build, tp_error *err)
{
    tp_text why = TP_NO_TEXT;
    if (ask(build, add_obstacle, &why) == 0)
        return 0;
    ask(build, add_preference, &why);
    const bool whole = why.size == 0;
    if (whole)
        tp_text_add(&why,
                    "%s by auto, since shards of each would have fewer than %d "
                    "features, and each rank has at least %d experts",
                    rule, THIN, ENOUGH);
    const char *text = tp_build_text(build, &why, err);
    if (text == NULL)
        return -1;
    return whole ? shard(build, text, err) : keep_width(build, text, err);
}

static int
insist(tp_build *build, tp_error *err)
{
    tp_text why = TP_NO_TEXT;
    const int count = ask(build, add_obstacle, &why);
    if (why.failed)
        return tp_text_fail(&why, TP_MEMORY, err);
    if (why.size > 0) {
        tp_fail(err, TP_VALUE, WHERE "%s; write 'width'", why.data);
        tp_text_free(&why);
        return -1;
    }
    /* The self-check may have found that they have to be replicated. */
    if (count == 0 && build->options->replicated_count == 0)
        return tp_fail(err, TP_VALUE,
                       WHERE
                       "no module of the model holds experts that are sharded; "
                       "leave the key out");
    return shard(build, rule, err);
}

int
tp_whole_experts_settle(tp_build *build, tp_error *err)
{
    if (build->options->ranks == 1 ||
        build->options->expert_partition == TP_EXPERTS_IN_WIDTH)
        return 0;
    return build->options->expert_partition == TP_EXPERTS_WHOLE ? insist(build, err)
                                                                : choose(build, err);
}

int
tp_whole_experts_first(const tp_build *build, int module)
{
    const int first = tp_model_first_parameter(build->model, module);
    return first >= 0 && build->choices[first].spec == &along_experts ? first : -1;
}
